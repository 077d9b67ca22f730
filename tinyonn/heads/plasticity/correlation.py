"""Agreement of two numbers per head: Spearman's rank correlation with a bootstrap interval, and the overlap of the largest.

    rho      Pearson's correlation of the ranks, ties averaged
    overlap  |top k of x ∩ top k of y| / k; k² / heads are shared by chance, a share of k / heads

The interval is a percentile bootstrap over paired heads. It shows the variation of rho with the choice of heads, not with the training
run; several seeds show that. A number that cannot be computed is None with a reason, never NaN.
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
# Number of resampled ranks in memory at once.
_BATCH_NUMBERS = 4_000_000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its two-sided p and bootstrap interval; None with a reason if it cannot be computed."""

    rho: float | None
    p: float | None
    low: float | None
    high: float | None
    reason: str | None


@dataclass(frozen=True)
class Overlap:
    """Number of heads among the k largest of both columns."""

    k: int
    shared: int | None
    share: float | None
    chance: float | None
    reason: str | None


def require_scipy() -> Any:
    """scipy.stats, if scipy is installed.

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
        names: names of x and y in reasons.

    Returns:
        rho, its p from the t distribution, and the 95 % percentile interval of 2,000 seeded, paired resamples of the heads.
    """
    stats = require_scipy()
    reason = _no_ranks(x, y, names)
    if reason is not None:
        return RankCorrelation(None, None, None, None, reason)
    found = stats.spearmanr(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of resamples without spread, which are handled below
        interval = stats.bootstrap(
            (x, y),
            _rho,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_NUMBERS // len(x)),
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(BOOTSTRAP_SEED),  # `rng` in scipy 1.15 and later, which accepts both
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not np.isfinite([low, high]).all():
        return RankCorrelation(float(found.statistic), float(found.pvalue), None, None, "a resample holds one value only: no interval")
    return RankCorrelation(float(found.statistic), float(found.pvalue), low, high, None)


def spearman(x: Floats, y: Floats) -> float | None:
    """Spearman's rho alone; None if a column is constant or there are too few heads."""
    return None if _no_ranks(x, y, ("x", "y")) else float(_rho(x, y))


def top_overlap(x: Floats, y: Floats, k: int, names: tuple[str, str] = ("x", "y")) -> Overlap:
    """Overlap of the k largest heads by x and by y; ties rank in the order of the heads.

    Args:
        x, y: (heads,), finite.
        k: at least 1. If it is the number of heads or more, the overlap is None.
        names: names of x and y in reasons.
    """
    k = min(k, len(x))
    constant = _constant(x, y, names)
    if constant is not None:
        return Overlap(k, None, None, None, constant)
    shared = len(set(top_heads(x, k)) & set(top_heads(y, k)))
    return Overlap(k, shared, shared / k, k / len(x), f"all {k} heads are among the highest" if k == len(x) else None)


def top_heads(values: Floats, k: int) -> list[int]:
    """Positions of the k largest values, largest first; ties in their order."""
    return [int(place) for place in np.argsort(-values, kind="stable")[:k]]


def mean_interval(values: Floats, lowest: float = -np.inf, highest: float = np.inf) -> dict[str, Any]:
    """Mean over seeds with Student's t interval.

    Args:
        values: (seeds,), finite.
        lowest, highest: range of the quantity, to which the interval is clipped.

    Returns:
        {"n", "mean", "sd", "low", "high", "reason"}: sd is that of the sample (n − 1); one seed has neither sd nor interval.
    """
    count = len(values)
    found = {"n": count, "mean": float(np.mean(values)) if count else None, "sd": None, "low": None, "high": None}
    if count < 2:
        return {**found, "reason": "one seed gives no interval" if count else "no seed has this number"}
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(require_scipy().t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * sd / float(np.sqrt(count))
    return {**found, "sd": sd, "low": max(mean - reach, lowest), "high": min(mean + reach, highest), "reason": None}


def _rho(x: Floats, y: Floats, axis: int = -1) -> Floats:
    """Spearman's rho along the last axis; NaN for a constant sample."""
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
