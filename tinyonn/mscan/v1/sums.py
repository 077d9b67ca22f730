"""Sums over planes that version 2 files store and version 1 files lack."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..stats import PlaneStats
from ..types import Integral


def integrate(activation: np.ndarray, grad_norm: np.ndarray, offsets: np.ndarray) -> Integral:
    """∫SPS and moments of two planes in float64, as a scan computes them on its device, for files without integrals.

    Args:
        activation, grad_norm: (tokens, blocks), NaN = missing.
        offsets: (groups + 1,) first column of each group; z-scores are per group.
    """
    planes = [np.where(np.isnan(activation) | np.isnan(grad_norm), np.nan, plane.astype(np.float64)) for plane in (activation, grad_norm)]
    present = ~np.isnan(planes[0])
    sps = np.zeros(activation.shape[1])
    for begin, end in pairwise(offsets):
        here, count = present[:, begin:end], np.maximum(present[:, begin:end].sum(1, keepdims=True), 1)
        for plane, sign in zip(planes, (1.0, -1.0), strict=True):
            values = np.where(here, plane[:, begin:end], 0.0)
            mean = values.sum(1, keepdims=True) / count
            centred = np.where(here, values - mean, 0.0)
            std = np.sqrt((centred**2).sum(1, keepdims=True) / count)
            z = np.divide(centred, std, out=np.zeros_like(centred), where=std > 1e-6 * np.abs(mean))
            sps[begin:end] += sign * z.sum(0)
    return Integral.from_planes(sps, present, planes)


def plane_stats(plane: np.ndarray, bases: list[int], columns: list[int]) -> PlaneStats:
    """Statistics of each weight over one plane.

    Args:
        plane: (tokens, blocks) float64, finite or NaN = missing.
        bases, columns: (entries,) first column and number of columns of each weight.
    """
    present = ~np.isnan(plane)
    values = np.where(present, plane, 0.0)

    def per_entry(cells: np.ndarray) -> np.ndarray:
        return np.add.reduceat(cells.sum(axis=0), bases)

    count = per_entry(present)
    mean = per_entry(values) / np.maximum(count, 1)
    deviation = np.where(present, values - np.repeat(mean, columns), 0.0)
    integers = [per_entry(cells).astype(np.uint64) for cells in (present, present & (plane == 0), ~present)]
    return PlaneStats(integers[0], mean, per_entry(deviation**2), integers[1], integers[2], np.zeros(len(bases), np.uint64))
