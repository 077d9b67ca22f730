"""`DynNSAOptions` from user input, checked before a model is changed rather than in its first forward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...nn.dyn_nsa import OPEN, DynNSAOptions
from ...ops._dispatch import check_impl
from ...ops.nsa._checks import check_max_blocks, check_sizes, check_window
from .._converted import check_fields

_NUMBERS = ("temperature", "base", "slope", "tau", "budget_weight")
_FLAGS = ("detach_scores", "learnable_compression")


def checked_options(given: Mapping[str, Any], source: str = "options", start: Mapping[str, Any] | None = None) -> DynNSAOptions:
    """Options from a dict of field names.

    Args:
        source: name of the dict in error messages.
        start: values of fields that are not given; None for the defaults of `DynNSAOptions`.

    Raises:
        TypeError: a value has the wrong type. ValueError: a value is out of range. InputError: not a dict, or an unknown field.
    """
    check_fields(DynNSAOptions, given, source)
    for name in _NUMBERS:
        if name in given:
            _check_number(name, given[name])
    for name in _FLAGS:
        if name in given and not isinstance(given[name], bool):
            raise TypeError(f"{name} must be a bool, got {type(given[name]).__name__}.")
    gates = given.get("start_gates", ())
    if not isinstance(gates, (list, tuple)):
        raise TypeError(f"start_gates must be a tuple of 3 numbers, got {type(gates).__name__}.")
    for gate in gates:
        _check_number("start_gates", gate)
    options = DynNSAOptions(**{**(start or {}), **given})
    check_sizes(options.block_size, options.compress_size)
    check_window(options.window)
    if options.max_blocks is not None:
        check_max_blocks(options.max_blocks)
    check_impl(options.impl)
    return options


def opening_of(options: DynNSAOptions) -> float:
    """Opening at which every gate of every block is 1: no threshold, at any tau, is above the least importance, -20, less temperature."""
    highest = options.base + max(0.0, -options.slope)
    rounding = 0.01 * (abs(options.base) + abs(options.slope))  # of bfloat16
    return min(OPEN, -20.0 - options.temperature - highest - rounding)


def checked_tau(tau: Tensor | float | None, batch: int, tokens: int, num_kv_heads: int) -> Tensor | float | None:
    """The caller's tau, of a shape that fits: (), (B,), (B, T) or (B, T, K).

    Raises:
        TypeError: neither a number nor a tensor. InputError: another shape, or a number outside [0, 1].
    """
    if tau is None:
        return None
    if not isinstance(tau, Tensor):
        _check_number("tau", tau)
        if not 0 <= tau <= 1:
            raise InputError(f"tau must be in [0, 1], got {tau}.")
        return tau
    shape, whole = tuple(tau.shape), (batch, tokens, num_kv_heads)
    if len(shape) > 3 or any(size not in (1, wanted) for size, wanted in zip(shape, whole, strict=False)):
        raise InputError(f"tau must have shape (), {whole[:1]}, {whole[:2]} or {whole}, got {shape}.")
    return tau


def as_tau(tau: Tensor | float, device: torch.device, shape: tuple[int, int, int]) -> Tensor:
    """(B, T, K) float32 of a tau that `checked_tau` let pass."""
    given = torch.as_tensor(tau, device=device).float()
    while given.dim() < 3:
        given = given.unsqueeze(-1)
    return given.expand(shape).contiguous()


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
