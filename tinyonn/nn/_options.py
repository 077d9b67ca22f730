"""Checks of a module's options, beside those of `ops._dispatch`."""

from __future__ import annotations

import math
import operator
from typing import Any

from ..ops._dispatch import check_is_number

_COMPARED = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def check_number(name: str, value: Any, **bounds: float) -> None:
    """TypeError or ValueError for anything but a finite number within the bounds: at_least, above, at_most, below."""
    check_is_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if not all(_COMPARED[rule](value, bound) for rule, bound in bounds.items()):
        rules = " and ".join(f"{rule.replace('_', ' ')} {bound:g}" for rule, bound in bounds.items())
        raise ValueError(f"{name} must be {rules}, got {value}.")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
