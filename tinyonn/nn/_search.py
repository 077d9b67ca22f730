"""Bisection."""

from __future__ import annotations

from collections.abc import Callable


def bisect(falling: Callable[[float], float], target: float, low: float, high: float, steps: int = 40) -> float:
    """Least number, within the precision of the steps, at which a falling function is at most the target."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return high
