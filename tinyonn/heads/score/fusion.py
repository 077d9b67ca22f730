"""Normalisation of head scores within each layer, and their fusion by rank.

A table of scores is a list with one float64 array (H,) for each layer; layers may differ in H. All comparisons are within a layer,
because heads of different layers read different residual streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import InputError
from ..study import NORM_COLUMNS


class RankedHead(NamedTuple):
    """Position of a head in a ranking; rank 1 has the largest combined score."""

    rank: int
    layer: int
    head: int
    combined: float


def average_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ascending ranks 1 … H, (H,) → (H,); equal values share the mean of their ranks.

    Raises:
        InputError: a value is NaN or infinite.
    """
    found = _finite(values)
    _, place, counts = np.unique(found, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[place]


def normalise(values: ArrayLike, mode: str = "zscore") -> NDArray[np.float64]:
    """Normalised scores of one layer's heads, (H,) → (H,).

    Args:
        values: finite scores.
        mode: "zscore", (x − mean) / std with the population's standard deviation, 0 if all values are equal; or "percentile", the
            share of the layer's other heads with a lower score, where equal ones count half: (rank − 1) / (H − 1) with ties averaged.
            It is 0 for the lowest head, 1 for the highest, 0.5 if all values are equal or the layer has one head.

    Raises:
        InputError: the mode is unknown, or a value is NaN or infinite.
    """
    found = _finite(values)
    match mode:
        case "zscore":
            if np.all(found == found[0]):  # the deviation of equal values is not always 0 in floating point
                return np.zeros_like(found)
            return (found - found.mean()) / found.std()
        case "percentile":
            return (average_ranks(found) - 1) / (len(found) - 1) if len(found) > 1 else np.array([0.5])
        case _:
            raise InputError(f"norm_mode must be one of {', '.join(NORM_COLUMNS)}, got {mode!r}.")


def fuse(scores: Mapping[str, Sequence[ArrayLike]], weights: Mapping[str, float]) -> list[NDArray[np.float64]]:
    """Sum of weight · rank over the named scores: (H,) for each layer. Ranks ascend within each layer; ties are averaged.

    Args:
        scores: name -> table; the shapes are equal.
        weights: name -> weight, for the same names.

    Raises:
        InputError: the names differ, or a value is NaN or infinite.
    """
    if set(scores) != set(weights):
        raise InputError(f"weights must have the names {', '.join(scores)}, got {', '.join(weights)}.")
    tables = [[weights[name] * average_ranks(layer) for layer in table] for name, table in scores.items()]
    return [np.sum(layers, axis=0) for layers in zip(*tables, strict=True)]


def top_heads(combined: Sequence[NDArray[np.float64]], count: int) -> list[RankedHead]:
    """Heads with the largest combined scores, best first. Ties are ordered by layer, then by head.

    Args:
        combined: (H,) for each layer.
        count: maximum number of heads.
    """
    heads = [(-float(value), layer, head) for layer, row in enumerate(combined) for head, value in enumerate(row)]
    return [RankedHead(rank, layer, head, -value) for rank, (value, layer, head) in enumerate(sorted(heads)[:count], start=1)]


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise InputError(f"scores of a layer must be a row of at least one head, got shape {found.shape}.")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise InputError(f"scores must be finite to be ranked, got {found[bad[0]]} at head {bad[0]}.")
    return found
