"""Checks of a module's options."""

from __future__ import annotations

import math
import operator
from typing import Any

_COMPARED = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_size(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_number(name: str, value: Any, **bounds: float) -> None:
    """TypeError or ValueError for anything but a finite number within the bounds: at_least, above, at_most, below."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if not all(_COMPARED[rule](value, bound) for rule, bound in bounds.items()):
        rules = " and ".join(f"{rule.replace('_', ' ')} {bound:g}" for rule, bound in bounds.items())
        raise ValueError(f"{name} must be {rules}, got {value}.")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
