"""Two kinds of heads, distinguished by importance before training and change in training.

    important-but-static        I_pre ≥ p_high of I_pre  and  Urel ≤ p_low of Urel
    plastic-but-unimportant     Urel ≥ p_high of Urel    and  I_pre ≤ p_low of I_pre

Percentiles are over all heads of the model, linear between values (numpy's default).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .correlation import Floats

STATIC = "important-but-static"
PLASTIC = "plastic-but-unimportant"


@dataclass(frozen=True)
class Thresholds:
    """Values at the percentiles."""

    I_pre_high: float
    I_pre_low: float
    Urel_high: float
    Urel_low: float


@dataclass(frozen=True)
class Cases:
    """Heads that are cases.

    Attributes:
        kinds: (heads,) STATIC, PLASTIC or "".
        thresholds: values at the percentiles.
        reason: reason why there are no cases: the high and the low percentile of a column are equal.
    """

    kinds: list[str]
    thresholds: Thresholds
    reason: str | None


def find_cases(importance: Floats, change: Floats, high: float = 90.0, low: float = 30.0) -> Cases:
    """Cases of one run.

    Args:
        importance: (heads,) I_pre, loss increase without the head before training.
        change: (heads,) Urel, relative change of the head's weights by training.
        high, low: percentiles, 0 ≤ low < high ≤ 100.
    """
    edges = Thresholds(
        *(float(np.percentile(importance, share)) for share in (high, low)), *(float(np.percentile(change, share)) for share in (high, low))
    )
    flat = [
        f"{name} has the same value at percentile {low:g} and at {high:g}"
        for name, above, below in (("I_pre", edges.I_pre_high, edges.I_pre_low), ("Urel", edges.Urel_high, edges.Urel_low))
        if not above > below
    ]
    if flat:
        return Cases([""] * len(importance), edges, " and ".join(flat))
    static = (importance >= edges.I_pre_high) & (change <= edges.Urel_low)
    plastic = (change >= edges.Urel_high) & (importance <= edges.I_pre_low)
    return Cases([STATIC if s else PLASTIC if p else "" for s, p in zip(static, plastic, strict=True)], edges, None)


def case_lists(cases: Cases, heads: list[dict[str, Any]], high: float, low: float) -> dict[str, Any]:
    """Content of cases.json: thresholds, and the heads of each kind with their numbers, most extreme first.

    Args:
        cases: result of `find_cases`.
        heads: one mapping per head in the same order, with at least layer, head, I_pre, U and Urel.
        high, low: percentiles that `cases` used.
    """

    def chosen(kind: str, by: str) -> list[dict[str, Any]]:
        found = [head for head, its in zip(heads, cases.kinds, strict=True) if its == kind]
        return sorted(found, key=lambda head: -head[by])

    return {
        "high": high,
        "low": low,
        "thresholds": asdict(cases.thresholds),
        "important_but_static": chosen(STATIC, "I_pre"),
        "plastic_but_unimportant": chosen(PLASTIC, "Urel"),
        "reason": cases.reason,
    }
