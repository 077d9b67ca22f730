"""`experts_implementation="tinyonn"`: the mixtures of transformers' models on `ops.expert_mlp`, with their surprise.

Importing this module registers it. A model's own activation is told by what it does to a few numbers, not by its name: an unknown one is
refused instead of being taken for another.
"""

from __future__ import annotations

import weakref
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.surprise_capture import probe_for
from ..ops import expert_mlp
from ..ops._torch_experts import Layout, activate
from ..ops.expert_mlp import Activation
from .interfaces import register_experts

NAME = "tinyonn"


# What transformers' experts read in their activation; where one changes, the layout is looked for again.
SETTINGS = ("act_fn", "alpha", "limit", "swiglu_alpha", "swiglu_limit")

_layouts: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Layout]] = weakref.WeakKeyDictionary()


def layout_of(module: Any) -> Layout:
    """The layout of transformers' experts; InputError where `expert_mlp` has no such experts."""
    settings = [getattr(module, name, None) for name in SETTINGS]
    known = _layouts.get(module)
    if known is not None and known[0] == settings:
        return known[1]
    if torch.compiler.is_exporting():
        raise InputError(f"{type(module).__name__} must have run once before it is exported: its activation is told by what it does.")
    layout = _find_layout(module)
    _layouts[module] = (settings, layout)
    return layout


@torch.no_grad()
def _find_layout(module: Any) -> Layout:
    name = type(module).__name__
    if module.has_post_expert_norm:
        raise InputError(f"experts_implementation must not be 'tinyonn' for {name}, which normalises each expert's output.")
    device = module.down_proj.device
    if device.type == "meta":
        raise InputError(f"{name} must be on a device with memory, got meta.")
    # Small ones tell activations apart, large ones any clamp; no symmetry that would confuse gate and up.
    near = torch.linspace(-11.3, 12.9, 96, dtype=torch.float64, device="cpu").roll(5)
    far = torch.logspace(1, 4.5, 192, dtype=torch.float64, device="cpu").view(8, 24).T.flatten()
    far = torch.where(torch.arange(192, device="cpu") % 3 == 0, -far, far)
    pre = torch.cat([near, far]).view(12, 24)
    own = (module._apply_gate if module.has_gate else module.act_fn)(pre.float().to(device)).double().cpu()
    for activation in get_args(Activation):
        for interleaved in (False, True) if module.has_gate else (False,):
            layout = Layout(activation, module.has_gate, interleaved, module.is_transposed)
            if torch.allclose(activate(pre, layout), own, rtol=1e-4, atol=1e-5):
                return layout
    raise InputError(
        f"experts_implementation must not be 'tinyonn' for {name}: its activation is none of {', '.join(get_args(Activation))}; "
        "take 'grouped_mm' or 'eager'."
    )


@torch.compiler.disable(reason="whether a surprise is captured is asked at each call")
def _probe(module: nn.Module, top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor | None:
    return probe_for(module, top_k_index, num_experts, dtype)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts over routed pairs, in transformers' layout.

    Compiled, each mixture is a graph break: whether its surprise is captured is asked at each call. Exported, which takes one call before,
    it hands out no surprise.

    Args:
        module: holds (gate_)up_proj, down_proj and perhaps their biases.
        hidden_states: (N, F).
        top_k_index: (N, K); indices outside 0 … E−1 are unused slots.
        top_k_weights: (N, K).

    Returns:
        (N, F), hidden_states' dtype.
    """
    layout = layout_of(module)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weights = [getattr(module, up), module.down_proj]
    biases = [getattr(module, f"{up}_bias"), module.down_proj_bias] if module.has_bias else [None, None]
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights[0].dtype
    gate_up, down = (x.to(dtype) for x in weights)
    gate_up_bias, down_bias = (None if x is None else x.to(dtype) for x in biases)
    probe = None if torch.compiler.is_exporting() else _probe(module, top_k_index, len(weights[0]), dtype)
    out = expert_mlp(
        hidden_states.to(dtype), gate_up, down, top_k_index, top_k_weights, gate_up_bias=gate_up_bias, down_bias=down_bias,
        **layout._asdict(),
        surprise=probe,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


register_experts(NAME, experts_forward)
