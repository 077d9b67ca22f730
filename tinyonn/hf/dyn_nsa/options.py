"""`DynNSAOptions` from user input, checked before a model is changed rather than in its first forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...nn.dyn_nsa import OPEN, DynNSAOptions, tau_of_rows
from ...ops._checks import check_number
from .._converted import check_fields


def checked_options(given: Mapping[str, Any], source: str = "options", start: Mapping[str, Any] | None = None) -> DynNSAOptions:
    """Options from a dict of field names.

    Args:
        source: name of the dict in error messages.
        start: values of fields that are not given; None for the defaults of `DynNSAOptions`.

    Raises:
        TypeError: a value has the wrong type. ValueError: a value is out of range. InputError: not a dict, or an unknown field.
    """
    check_fields(DynNSAOptions, given, source)
    return DynNSAOptions(**{**(start or {}), **given})


def opening_of(options: DynNSAOptions) -> float:
    """Opening at which every gate of every block is 1: at any tau a threshold is at most -20, the least importance, minus temperature."""
    highest = options.base + max(0.0, -options.slope)
    rounding = 0.01 * (abs(options.base) + abs(options.slope))  # of bfloat16
    return min(OPEN, -20.0 - options.temperature - highest - rounding)


def checked_tau(tau: Tensor | float, rows: tuple[int, int, int], query: Tensor) -> Tensor:
    """The caller's tau, of shape (), (B,), (B, T) or (B, T, K), for each of `rows`, (B, T, K).

    Raises:
        TypeError: neither a number nor a tensor. InputError: another shape, or a number outside [0, 1].
    """
    if not isinstance(tau, Tensor):
        check_number("tau", tau)
        if not 0 <= tau <= 1:
            raise InputError(f"tau must be in [0, 1], got {tau}.")
        tau = torch.tensor(tau, dtype=torch.float64)
    shape = tuple(tau.shape)
    if len(shape) > 3 or any(size not in (1, wanted) for size, wanted in zip(shape, rows, strict=False)):
        raise InputError(f"tau must have shape (), {rows[:1]}, {rows[:2]} or {rows}, got {shape}.")
    return tau_of_rows(tau, rows, query)
