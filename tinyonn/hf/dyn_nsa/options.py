"""`DynNSAOptions` from user input, checked before a model is changed rather than in its first forward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...nn.dyn_nsa import OPEN, tau_of_rows
from ...nn.dyn_nsa_options import DynNSAOptions
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


# Of records that name no importance, which earlier versions wrote.
_OLD_RULE = {"importance": "relative", "compress_size": 64, "slope": 1.0, "compress_query": False}


def with_rule(options: Any, source: str) -> Any:
    """Options of a record, those of an earlier version with the rule that it had, and one warning that names it.

    Args:
        source: name of the record.
    """
    if not isinstance(options, Mapping) or "importance" in options:
        return options
    warnings.warn(
        f"{source} records no importance: it keeps the rule that it was converted with, importance='relative'; convert the model again for "
        "'share'.",
        stacklevel=2,
    )
    return {**_OLD_RULE, **options}


def open_price(options: DynNSAOptions) -> float:
    """Price at which every gate of every block is 1: no threshold, at any tau and temperature, is above the least importance less that."""
    highest = options.base + max(0.0, -options.slope)
    rounding = 0.01 * (abs(options.base) + abs(options.slope))  # of bfloat16
    return min(OPEN, OPEN - highest - rounding)


def price_of_budget(options: DynNSAOptions, budget: float) -> float:
    """The price that reads about `budget` blocks per query, forced ones included, on texts like those of the last calibration.

    Raises:
        InputError: the model was not calibrated, or a schedule or a distillation has dropped the prices; the budget is not above the forced
            blocks. TypeError, ValueError: no finite number.
    """
    check_number("block_budget", budget)
    if not options.prices:
        raise InputError(
            "block_budget must follow calibrate, got a model that was not calibrated, or that BudgetSchedule or distil_compression changed "
            "since."
        )
    forced = options.forced if options.prices_forced is None else options.prices_forced
    if budget <= forced:
        raise InputError(f"block_budget must be above {forced:.4g}, the forced blocks per query in the sample of calibrate, got {budget}.")
    far, points = budget - forced, options.prices
    after = next((i for i, point in enumerate(points) if point[0] >= far), len(points) - 1)
    if after == 0 or points[after][0] < far:
        return points[after][1]
    (low, high), (upper, lower) = points[after - 1], points[after]
    return high + (lower - high) * (far - low) / (upper - low)


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
