"""Bytes of activations that a model keeps between forward and backward, computed without running it.

The model is traced on fake tensors, which have shapes and no data, and the storages that autograd saves are counted. The count therefore
holds for any architecture, and needs neither weights nor memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...hf.interfaces import experts_implementation, register_experts
from ...hf.loading import class_fault
from .forward import logits_from_embeddings

TRACED_EXPERTS = "tinyonn_traced_experts"


def skeleton(model_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, frozen: every parameter on the meta device, or fake under a FakeTensorMode.

    Raises:
        InputError: the model is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=dtype)  # it writes the dtype into it
    except (ValueError, TypeError) as error:
        said = class_fault(error, "AutoModelForCausalLM", model_config)
        raise InputError(f"model_path must hold a causal language model, got {type(model_config).__name__}: {said}") from error
    return model.eval().requires_grad_(False)


def saved_bytes(model_config: Any, dtype: torch.dtype, batch: int, length: int) -> int:
    """Bytes that autograd holds after the forward pass of a frozen model, without its parameters.

    Args:
        model_config: transformers' configuration.
        dtype: precision of the weights.
        batch, length: number of sequences, and of tokens of each.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    storages: dict[int, tuple[int, Tensor]] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = (storage.nbytes(), tensor)  # the tensor, so that its storage's address is not used again
        return tensor

    with FakeTensorMode():
        model = skeleton(model_config, dtype)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        with (
            torch.enable_grad(),
            experts_implementation(model, TRACED_EXPERTS),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            logits_from_embeddings(model, torch.zeros((batch, length), dtype=torch.int64))
        return sum(size for size, _ in storages.values())


def _traced_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts with the sizes of routed work but no data; all k rows of each token go to expert 0."""
    pairs = top_k_index.shape[1]

    def product(name: str, rows: Tensor) -> Tensor:
        weight = getattr(module, name)[0]
        out = rows @ (weight if module.is_transposed else weight.T)
        return out + getattr(module, f"{name}_bias")[0] if module.has_bias else out

    pre = product("gate_up_proj" if module.has_gate else "up_proj", hidden_states.repeat_interleave(pairs, 0))
    out = product("down_proj", module._apply_gate(pre) if module.has_gate else module.act_fn(pre))
    return (out.unflatten(0, (-1, pairs)) * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


register_experts(TRACED_EXPERTS, _traced_experts)
