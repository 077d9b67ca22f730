"""Numbers of heat maps: cells, normalisation and colour scale.

    layer   (x − mean of the row) / std of the row          every layer shows its own pattern
    global  (x − mean of the map) / std of the map          layers compare with each other
    none    x                                               stored units

For SPS and ∫SPS, zero means "average of the layer", so they are divided by their root mean square and never centred.
A row or map without spread becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..scan.data import ScanData
from ..scan.grid import Floats

Normalisation = Literal["layer", "global", "none"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)

# In standard deviations; all values beyond have the same colour.
_LIMIT_STD = 3.0
# A sequential scale is logarithmic if the largest value is this many times the smallest.
_LOG_RATIO = 30.0


@dataclass(frozen=True)
class Scale:
    """Colour scale for values low … high; `clipped` if some values lie outside."""

    kind: Literal["diverging", "sequential"]
    log: bool
    low: float
    high: float
    clipped: bool
    unit: str


@dataclass(frozen=True)
class HeatMap:
    """One quantity over layers × modules.

    Attributes:
        key: short name for page and file names.
        title: title above the map.
        legend: sentence below the title.
        unit: unit of the stored values.
        signed: whether zero has a meaning of its own (SPS).
        values: (layers, modules) stored values, NaN for a module that the layer lacks.
        views: normalised values and their scale.
    """

    key: str
    title: str
    legend: str
    unit: str
    signed: bool
    values: Floats
    views: dict[Normalisation, tuple[Floats, Scale]]


LEGENDS = {
    "activation": "Activation norm: the length of a block's output vector (64 features) for a token.",
    "gradient": "Gradient norm: the norm of the gradient of the text's loss with respect to the block's weights, from that token alone.",
    "sps": "SPS, the synergistic prediction score: z(activation norm) − z(gradient norm) within a layer. Above 0, a block is active and "
    "its weights need little change; below 0, the loss would change its weights more than its activity suggests; 0 is the layer's average.",
    "integral": "∫SPS: the sum of SPS over all tokens, here also over the blocks of the module. It grows with the length of the scan.",
}


def scan_maps(data: ScanData) -> list[HeatMap]:
    """The four maps of a scan: mean activation, mean gradient, mean SPS (all weighted by tokens) and ∫SPS."""
    totals, grid = data.totals, data.grid
    cells = [
        ("activation", "Mean activation norm", "norm of the output", False, grid.mean(totals.activation, totals.count)),
        ("gradient", "Mean gradient norm", "loss per weight", False, grid.mean(totals.gradient, totals.count)),
        ("sps", "Mean SPS", "standard deviations per token", True, grid.mean(totals.sps, totals.count)),
        ("integral", "∫SPS", "standard deviations, summed", True, grid.sum(totals.integral)),
    ]
    return [make_map(key, title, LEGENDS[key], unit, values, signed=signed) for key, title, unit, signed, values in cells]


def make_map(key: str, title: str, legend: str, unit: str, values: Floats, *, signed: bool) -> HeatMap:
    """A map with all normalisations."""
    views: dict[Normalisation, tuple[Floats, Scale]] = {}
    for how in NORMALISATIONS:
        shown = normalise(values, how, centred=not signed)
        views[how] = (shown, choose_scale(shown, how, unit, signed=signed))
    return HeatMap(key, title, legend, unit, signed, values, views)


def normalise(values: Floats, how: Normalisation, *, centred: bool) -> Floats:
    """Normalises (layers, modules) by the formulas at the top of this file; NaN stays NaN."""
    if how == "none":
        return values.copy()
    axis = 1 if how == "layer" else None
    present = np.isfinite(values)
    count = np.maximum(present.sum(axis=axis, keepdims=True), 1)
    filled = np.where(present, values, 0.0)
    middle = filled.sum(axis=axis, keepdims=True) / count if centred else np.zeros_like(count, dtype=np.float64)
    offset = np.where(present, values - middle, 0.0)
    spread = np.sqrt((offset**2).sum(axis=axis, keepdims=True) / count)
    size = np.abs(filled).max(axis=axis, keepdims=True, initial=0.0)
    # SPS of a whole layer is 0 up to rounding errors, which must not be scaled to one standard deviation.
    flat = spread <= (1e-6 * size if centred else 1e-9 * size.max(initial=0.0))
    return np.where(present, np.where(flat, 0.0, offset / np.where(flat, 1.0, spread)), np.nan)


def choose_scale(values: Floats, how: Normalisation, unit: str, *, signed: bool) -> Scale:
    """A scale for most of the values; those beyond the 99th percentile may share the last colour."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if signed or how != "none":
        if how == "none":
            limit = float(np.quantile(np.abs(finite), 0.99)) if len(finite) else 0.0
        else:
            limit = min(largest, _LIMIT_STD)
            unit = f"standard deviations of the {'layer' if how == 'layer' else 'map'}"
        limit = limit or largest or 1.0
        return Scale("diverging", False, -limit, limit, largest > limit * (1 + 1e-9), unit)
    positive = finite[finite > 0]
    if len(positive) and not (finite < 0).any() and positive.max() > _LOG_RATIO * positive.min():
        low, high = (float(edge) for edge in np.quantile(positive, [0.005, 1.0]))
        return Scale("sequential", True, low, high, bool((finite < low).any()), unit)
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return Scale("sequential", False, low, high if high > low else low + 1.0, False, unit)
