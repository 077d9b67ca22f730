"""Statistics of each weight over a whole file, stored in its index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Moments = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def add_moments(a: Moments, b: Moments) -> Moments:
    """Count, mean and sum of squared deviations of the union of two samples (Chan, Golub, LeVeque, 1979)."""
    count = a[0] + b[0]
    share = b[0] / np.maximum(count, 1)
    delta = b[1] - a[1]
    return count, a[1] + delta * share, a[2] + b[2] + delta * delta * a[0] * share


@dataclass(frozen=True, slots=True, eq=False)
class PlaneStats:
    """Statistics of one plane, one value per layout entry, over all its stored tokens and blocks.

    Attributes:
        count: (entries,) number of finite values, including zeros.
        mean: (entries,) float64, mean of these values, 0 where count is 0.
        m2: (entries,) float64, sum of squared deviations from the mean.
        zeros, missing, nonfinite: (entries,) number of values that are exactly 0, NaN, infinite.
    """

    count: NDArray[np.uint64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    zeros: NDArray[np.uint64]
    missing: NDArray[np.uint64]
    nonfinite: NDArray[np.uint64]

    @property
    def std(self) -> NDArray[np.float64]:
        """(entries,) population standard deviation."""
        return np.sqrt(self.m2 / np.maximum(self.count, 1))

    def __add__(self, other: PlaneStats) -> PlaneStats:
        moments = add_moments((self.count, self.mean, self.m2), (other.count, other.mean, other.m2))
        return PlaneStats(*moments, self.zeros + other.zeros, self.missing + other.missing, self.nonfinite + other.nonfinite)


@dataclass(frozen=True, slots=True, eq=False)
class ModuleStats:
    """Statistics of both planes; `names[i]` is the name of layout entry i."""

    names: list[str]
    activation: PlaneStats
    grad_norm: PlaneStats

    @classmethod
    def from_arrays(cls, names: list[str], counts: NDArray[np.uint64], moments: NDArray[np.float64]) -> ModuleStats:
        """Statistics from the codec's (entries, 2, 4) counts and (entries, 2, 2) moments."""
        planes = []
        for p in range(2):
            count, zeros, missing, nonfinite = (counts[:, p, k].copy() for k in range(4))
            planes.append(PlaneStats(count, moments[:, p, 0].copy(), moments[:, p, 1].copy(), zeros, missing, nonfinite))
        return cls(names, *planes)

    def __add__(self, other: ModuleStats) -> ModuleStats:
        if self.names != other.names:
            raise ValueError("statistics of different layouts cannot be added.")
        return ModuleStats(self.names, self.activation + other.activation, self.grad_norm + other.grad_norm)
