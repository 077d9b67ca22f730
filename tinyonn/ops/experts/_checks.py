"""Checks of the arguments of `expert_mlp`: shapes, types, devices and, under `tinyonn.debug()`, values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...reference.experts.expert_mlp import LIMITS
from .._dispatch import check_float, check_no_nan, check_same_device, statistics_dtype
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
    experts, width = gate_up_proj.shape[0], gate_up_proj.shape[2 if transposed else 1]
    if gated and width % 2:
        raise ValueError(f"gate_up_proj must have an even number of outputs with gated=True, got {width}.")
    neurons = width // 2 if gated else width
    _check_shape("down_proj", down_proj, (experts, neurons, features) if transposed else (experts, features, neurons), hidden_states)
    _check_shape("gate_up_proj", gate_up_proj, tuple(gate_up_proj.shape), hidden_states)
    if gate_up_bias is not None:
        _check_shape("gate_up_bias", gate_up_bias, (experts, width), hidden_states)
    if down_bias is not None:
        _check_shape("down_bias", down_bias, (experts, features), hidden_states)
    check_index_type(top_k_index)
    if top_k_index.dim() != 2 or top_k_index.shape[0] != tokens:  # `len` would make it a constant in torch.export
        raise ValueError(f"top_k_index must have shape ({tokens}, K), got {tuple(top_k_index.shape)}.")
    check_same_device("top_k_index", top_k_index, hidden_states.device)
    check_float("top_k_weights", top_k_weights)
    check_same_device("top_k_weights", top_k_weights, hidden_states.device)
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"top_k_weights must have shape {tuple(top_k_index.shape)}, got {tuple(top_k_weights.shape)}.")


def limit_of(activation: str, limit: float | None) -> float:
    """The limit of a clamped activation, with its default for None; 0 for an activation without clamps."""
    if activation not in LIMITS:
        if limit is not None:
            raise ValueError(f"limit must be None with activation={activation!r}, which has no clamp, got {limit}.")
        return 0.0
    if limit is None:
        return LIMITS[activation]
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise TypeError(f"limit must be a number, got {type(limit).__name__}.")
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be above 0 and finite, got {limit}.")
    return float(limit)


def check_index_type(top_k_index: Tensor) -> None:
    if not isinstance(top_k_index, Tensor) or top_k_index.dtype not in (torch.int32, torch.int64):
        found = top_k_index.dtype if isinstance(top_k_index, Tensor) else type(top_k_index).__name__
        raise TypeError(f"top_k_index must be an int32 or int64 tensor, got {found}.")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], hidden_states: Tensor) -> None:
    check_float(name, tensor)
    check_same_device(name, tensor, hidden_states.device)
    if tensor.dtype != hidden_states.dtype:
        raise TypeError(f"{name} must be {hidden_states.dtype} like hidden_states, got {tensor.dtype}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")


def check_probe(surprise: Tensor, top_k_index: Tensor, hidden_states: Tensor) -> None:
    check_float("surprise", surprise)
    check_same_device("surprise", surprise, hidden_states.device)
    dtype = statistics_dtype(hidden_states.dtype)
    if surprise.dtype != dtype:
        raise TypeError(f"surprise must be {dtype}, got {surprise.dtype}.")
    if surprise.shape != top_k_index.shape:
        raise ValueError(f"surprise must have shape {tuple(top_k_index.shape)}, got {tuple(surprise.shape)}.")
    if torch.is_grad_enabled() and not surprise.requires_grad:
        raise ValueError("surprise does not require grad, but its gradient is the surprise: create it with requires_grad=True.")


def check_values(inputs: Inputs) -> None:
    """ValueError if an index is out of range or a value is NaN. Reads the tensors: for `tinyonn.debug()`."""
    top_k_index, num_experts = inputs.top_k_index, inputs.gate_up_proj.shape[0]
    outside = (top_k_index < 0) | (top_k_index > num_experts)
    if bool(outside.any()):
        token, slot = outside.nonzero()[0].tolist()
        found = int(top_k_index[token, slot])
        raise ValueError(f"top_k_index must be 0 … {num_experts}, {num_experts} for an unused slot, got {found} for token {token}.")
    for name in ("top_k_weights", "hidden_states", "gate_up_proj", "down_proj"):
        check_no_nan(name, getattr(inputs, name))
