"""Experts that expose the rows of each (token, expert) pair, so that a scan can record them.

    pre  = x_t W_gate_up[e]ᵀ + b      h = gate(pre)      out = h W_down[e]ᵀ + b'      y_t = Σ_e weight_te · out

Pairs are sorted by expert, and each product is one grouped matrix product where `torch.nn.functional.grouped_mm` takes the
tensors, else one product per expert in use. The same function as the stock ones, up to rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.interfaces import experts_implementation, register_experts

SCAN_EXPERTS = "tinyonn_scan_experts"

# Called with (parameter name, tokens, experts, inputs, output) for each product of a module's experts.
PairRecorder = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]

_recorders: weakref.WeakKeyDictionary[nn.Module, PairRecorder] = weakref.WeakKeyDictionary()


@contextmanager
def recorded_experts(model: nn.Module, recorders: dict[nn.Module, PairRecorder]) -> Iterator[None]:
    """Runs the model's experts here within the block; each module in `recorders` reports its products."""
    if not recorders:
        yield
        return
    with experts_implementation(model, SCAN_EXPERTS):
        _recorders.update(recorders)
        try:
            yield
        finally:
            for module in recorders:
                _recorders.pop(module, None)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts over routed pairs, in transformers' layout.

    Args:
        module: experts module with (gate_)up_proj (E, 2I or I, F), down_proj (E, F, I), transposed if `is_transposed`, and their biases.
        hidden_states: (N, F).
        top_k_index: (N, k); indices outside 0 … E−1 are empty slots.
        top_k_weights: (N, k).

    Returns:
        (N, F), hidden_states' dtype.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    num_experts = getattr(module, up_name).shape[0]
    tokens, slots = ((top_k_index >= 0) & (top_k_index < num_experts)).nonzero(as_tuple=True)
    experts, order = torch.sort(top_k_index[tokens, slots], stable=True)
    tokens, slots = tokens[order], slots[order]
    counts = torch.bincount(experts, minlength=num_experts)
    recorder = _recorders.get(module)

    def product(name: str, inputs: Tensor) -> Tensor:
        weight = getattr(module, name)
        output = _grouped_product(inputs, weight if module.is_transposed else weight.transpose(1, 2), counts)
        if module.has_bias:
            output = output + getattr(module, f"{name}_bias")[experts]
        if recorder is not None:
            recorder(name, tokens, experts, inputs, output)
        return output

    pre = product(up_name, hidden_states[tokens])
    hidden = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    out = product("down_proj", hidden)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    weighted = out * top_k_weights[tokens, slots, None]
    # A slot each, then a sum: deterministic, and unlike index_add it keeps no copy of what it adds for backward.
    slotted = weighted.new_zeros(*top_k_index.shape, weighted.shape[1]).index_put((tokens, slots), weighted)
    return slotted.sum(1).to(hidden_states.dtype)


def _grouped_product(inputs: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """(S, in) sorted by expert, times weight (E, in, out), counts[e] rows each -> (S, out)."""
    if _grouped_mm_takes(inputs, weight):
        return torch.nn.functional.grouped_mm(inputs, weight, offs=counts.cumsum(0, dtype=torch.int32))
    parts = [rows @ weight[expert] for expert, rows in enumerate(inputs.split(counts.tolist())) if len(rows)]
    return torch.cat(parts) if parts else inputs.new_zeros(0, weight.shape[2])


def _grouped_mm_takes(inputs: Tensor, weight: Tensor) -> bool:
    # It needs 16-byte rows, another dtype than float64, and sm_80 or later.
    if inputs.dtype != weight.dtype or inputs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if inputs.is_cuda and (torch.cuda.get_device_capability(inputs.device) < (8, 0) or inputs.dtype == torch.float32):
        return False
    align = 16 // inputs.element_size()
    return len(inputs) > 0 and weight.shape[1] % align == 0 and weight.shape[2] % align == 0


register_experts(SCAN_EXPERTS, experts_forward)
