"""Checks of the arguments of `expert_mlp`: shapes, types, devices and, under `tinyonn.debug()`, values."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.experts.expert_mlp import LIMITS
from .._checks import check_float, check_no_nan, check_number, check_same_device, check_tensor
from .._dispatch import statistics_dtype
from ._tuples import Inputs


def check_inputs(inputs: Inputs, gated: bool, transposed: bool) -> None:
    """TypeError or ValueError if shapes, types or devices are not those that `expert_mlp` documents."""
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias = inputs
    check_float("hidden_states", hidden_states)
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must have shape (N, F), got {tuple(hidden_states.shape)}.")
    tokens, features = hidden_states.shape
    check_float("gate_up_proj", gate_up_proj)
    if gate_up_proj.dim() != 3 or gate_up_proj.shape[1 if transposed else 2] != features:
        wanted = f"(E, {features}, ·)" if transposed else f"(E, ·, {features})"
        raise ValueError(f"gate_up_proj must have shape {wanted}, got {tuple(gate_up_proj.shape)}.")
    check_float("down_proj", down_proj)
    experts, width = gate_up_proj.shape[0], gate_up_proj.shape[2 if transposed else 1]
    if gated and width % 2:
        raise ValueError(f"gate_up_proj must have an even number of outputs with gated=True, got {width}.")
    neurons = width // 2 if gated else width
    device = hidden_states.device
    for name, tensor, shape in (
        ("down_proj", down_proj, (experts, neurons, features) if transposed else (experts, features, neurons)),
        ("gate_up_proj", gate_up_proj, gate_up_proj.shape),
        ("gate_up_bias", gate_up_bias, (experts, width)),
        ("down_bias", down_bias, (experts, features)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, device, shape, hidden_states.dtype)
    check_index_type(top_k_index)
    if top_k_index.dim() != 2 or top_k_index.shape[0] != tokens:  # `len` would make it a constant in torch.export
        raise ValueError(f"top_k_index must have shape ({tokens}, K), got {tuple(top_k_index.shape)}.")
    check_same_device("top_k_index", top_k_index, device)
    check_tensor("top_k_weights", top_k_weights, device, top_k_index.shape)


def limit_of(activation: str, limit: float | None) -> float:
    """The limit of a clamped activation, with its default for None; 0 for an activation without clamps."""
    if activation not in LIMITS:
        if limit is not None:
            raise ValueError(f"limit must be None with activation={activation!r}, which has no clamp, got {limit}.")
        return 0.0
    if limit is None:
        return LIMITS[activation]
    check_number("limit", limit, above=0)
    return float(limit)


def check_index_type(top_k_index: Tensor) -> None:
    if not isinstance(top_k_index, Tensor) or top_k_index.dtype not in (torch.int32, torch.int64):
        found = top_k_index.dtype if isinstance(top_k_index, Tensor) else type(top_k_index).__name__
        raise TypeError(f"top_k_index must be an int32 or int64 tensor, got {found}.")


def check_probe(surprise: Tensor, top_k_index: Tensor, hidden_states: Tensor) -> None:
    check_tensor("surprise", surprise, hidden_states.device, top_k_index.shape, statistics_dtype(hidden_states.dtype))
    if torch.is_grad_enabled() and not surprise.requires_grad:
        raise ValueError("surprise does not require grad, but its gradient is the surprise: create it with requires_grad=True.")


def check_values(inputs: Inputs) -> None:
    """ValueError if an index is out of range or a value is NaN. Reads the tensors: for `tinyonn.debug()`."""
    check_index_range(inputs.top_k_index, inputs.gate_up_proj.shape[0])
    for name in ("top_k_weights", "hidden_states", "gate_up_proj", "down_proj"):
        check_no_nan(name, getattr(inputs, name))


def check_index_range(top_k_index: Tensor, num_experts: int) -> None:
    """ValueError if an index is neither an expert nor `num_experts`. Reads the tensor."""
    outside = (top_k_index < 0) | (top_k_index > num_experts)
    if bool(outside.any()):
        token, slot = outside.nonzero()[0].tolist()
        found = int(top_k_index[token, slot])
        raise ValueError(f"top_k_index must be 0 … {num_experts}, {num_experts} for an unused slot, got {found} for token {token}.")
