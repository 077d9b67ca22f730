"""Two kinds of heads, distinguished by importance before training and change in training.

    important-but-static        I_pre ≥ p_high of I_pre  and  Urel ≤ p_low of Urel
    plastic-but-unimportant     Urel ≥ p_high of Urel    and  I_pre ≤ p_low of I_pre

Percentiles are over all heads of the model, linear between values (numpy's default).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .correlation import Floats

STATIC = "important-but-static"
PLASTIC = "plastic-but-unimportant"
KINDS = {"important_but_static": STATIC, "plastic_but_unimportant": PLASTIC}  # by their names in files


@dataclass(frozen=True)
class Cases:
    """Heads that are cases.

    Attributes:
        kinds: (heads,) STATIC, PLASTIC or "".
        thresholds: values at the percentiles: I_pre_high, I_pre_low, Urel_high, Urel_low.
        reason: reason why there are no cases: the high and the low percentile of a column are equal.
    """

    kinds: list[str]
    thresholds: dict[str, float]
    reason: str | None


def find_cases(importance: Floats, change: Floats, high: float = 90.0, low: float = 30.0) -> Cases:
    """Cases of one run.

    Args:
        importance: (heads,) I_pre, loss increase without the head before training.
        change: (heads,) Urel, relative change of the head's weights by training.
        high, low: percentiles, 0 ≤ low < high ≤ 100.
    """
    edges = {
        f"{name}_{which}": float(np.percentile(values, share))
        for name, values in (("I_pre", importance), ("Urel", change))
        for which, share in (("high", high), ("low", low))
    }
    flat = [name for name in ("I_pre", "Urel") if not edges[f"{name}_high"] > edges[f"{name}_low"]]
    if flat:
        reasons = (f"{name} has the same value at percentile {low:g} and at {high:g}" for name in flat)
        return Cases([""] * len(importance), edges, " and ".join(reasons))
    static = (importance >= edges["I_pre_high"]) & (change <= edges["Urel_low"])
    plastic = (change >= edges["Urel_high"]) & (importance <= edges["I_pre_low"])
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
        "thresholds": cases.thresholds,
        "important_but_static": chosen(STATIC, "I_pre"),
        "plastic_but_unimportant": chosen(PLASTIC, "Urel"),
        "reason": cases.reason,
    }
