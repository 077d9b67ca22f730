"""How two numbers per head agree: Spearman's rank correlation with a bootstrap interval, and the overlap of the highest.

    rho      Pearson's correlation of the ranks, ties averaged
    overlap  |top k of x ∩ top k of y| / k; k² / heads of them are shared by chance, a share of k / heads

The interval draws heads anew, in pairs, with replacement (percentile bootstrap): how far rho moves with the choice of heads, not
with another training run; runs of several seeds say that. What cannot be computed is None with the reason in words, never NaN.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError, needs

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0
MIN_HEADS = 3
# Resampled ranks held at once, in numbers.
_BATCH_NUMBERS = 4_000_000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its two-sided p and bootstrap interval; None with a reason where the numbers do not give one."""

    rho: float | None
    p: float | None
    low: float | None
    high: float | None
    reason: str | None


@dataclass(frozen=True)
class Overlap:
    """How many of the k highest of one column are among the k highest of the other."""

    k: int
    shared: int | None
    share: float | None
    chance: float | None
    reason: str | None


def require_scipy() -> Any:
    """scipy.stats, or an error that says how to get it.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise InputError(f"{needs('a correlation of heads', 'scipy')}.") from error
    return stats


def rank_correlation(x: Floats, y: Floats, names: tuple[str, str] = ("x", "y")) -> RankCorrelation:
    """Spearman's rho of two numbers per head.

    Args:
        x, y: (heads,), finite.
        names: what the reasons call them.

    Returns:
        rho, its p by the t distribution, and the 95 % percentile interval of 2,000 paired resamples of the heads, seeded.
    """
    stats = require_scipy()
    reason = _no_ranks(x, y, names)
    if reason is not None:
        return RankCorrelation(None, None, None, None, reason)
    found = stats.spearmanr(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of what is answered below: a resample without spread
        interval = stats.bootstrap(
            (x, y),
            _rho,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_NUMBERS // len(x)),
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(BOOTSTRAP_SEED),  # `rng` in scipy 1.15 and later, which takes both
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not np.isfinite([low, high]).all():
        return RankCorrelation(float(found.statistic), float(found.pvalue), None, None, "a resample holds one value only: no interval")
    return RankCorrelation(float(found.statistic), float(found.pvalue), low, high, None)


def spearman(x: Floats, y: Floats) -> float | None:
    """Spearman's rho alone; None where a column is constant or heads are too few."""
    return None if _no_ranks(x, y, ("x", "y")) else float(_rho(x, y))


def top_overlap(x: Floats, y: Floats, k: int, names: tuple[str, str] = ("x", "y")) -> Overlap:
    """Overlap of the k highest heads by x and by y; equal values rank in the order of the heads.

    Args:
        x, y: (heads,), finite.
        k: at least 1; as many as there are heads or more means all of them, of which nothing can be said.
        names: what the reasons call them.
    """
    k = min(k, len(x))
    constant = _constant(x, y, names)
    if constant is not None:
        return Overlap(k, None, None, None, constant)
    shared = len(set(top_heads(x, k)) & set(top_heads(y, k)))
    return Overlap(k, shared, shared / k, k / len(x), f"all {k} heads are among the highest" if k == len(x) else None)


def top_heads(values: Floats, k: int) -> list[int]:
    """Positions of the k highest values, the highest first; equal values in their order."""
    return [int(place) for place in np.argsort(-values, kind="stable")[:k]]


def mean_interval(values: Floats, lowest: float = -np.inf, highest: float = np.inf) -> dict[str, Any]:
    """Mean over seeds with Student's t interval.

    Args:
        values: (seeds,), finite.
        lowest, highest: range of the quantity; the interval is cut there.

    Returns:
        {"n", "mean", "sd", "low", "high", "reason"}: sd is the sample's (n − 1); one seed has neither sd nor interval.
    """
    count = len(values)
    if count == 0:
        return {"n": 0, "mean": None, "sd": None, "low": None, "high": None, "reason": "no seed has this number"}
    mean = float(np.mean(values))
    if count == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None, "reason": "one seed gives no interval"}
    sd = float(np.std(values, ddof=1))
    reach = float(require_scipy().t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * sd / float(np.sqrt(count))
    return {"n": count, "mean": mean, "sd": sd, "low": max(mean - reach, lowest), "high": min(mean + reach, highest), "reason": None}


def _rho(x: Floats, y: Floats, axis: int = -1) -> Floats:
    """Spearman's rho along the last axis; NaN where a sample is constant."""
    rank = require_scipy().rankdata
    a, b = rank(x, axis=axis), rank(y, axis=axis)
    a, b = a - a.mean(axis=axis, keepdims=True), b - b.mean(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=axis) / np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))


def _no_ranks(x: Floats, y: Floats, names: tuple[str, str]) -> str | None:
    if len(x) < MIN_HEADS:
        return f"{len(x)} heads are too few for a rank correlation"
    return _constant(x, y, names)


def _constant(x: Floats, y: Floats, names: tuple[str, str]) -> str | None:
    same = [name for name, values in zip(names, (x, y), strict=True) if np.ptp(values) == 0]
    return f"{' and '.join(same)} {'is' if len(same) == 1 else 'are'} the same for every head" if same else None
