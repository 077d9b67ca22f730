"""Maps, profiles and bars as PNG files, drawn with matplotlib for papers and slides."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.files import replacing
from ...errors import InputError, needs
from ..html.maps import HeatMap, Normalisation, Scale
from ..html.palette import DIVERGING_LIGHT, SEQUENTIAL, SERIES_LIGHT
from .grid import Floats

_DPI = 150
_STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))


def require_matplotlib(instead: str = "") -> None:
    """Checks that matplotlib is installed, before any work.

    Args:
        instead: option that leaves the figures out, for the message; empty where there is none.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{needs('drawing PNGs', 'matplotlib')}{instead and f', or use {instead}'}.")


def draw_maps(path: Path, title: str, maps: Sequence[HeatMap], how: Normalisation, layers: Sequence[str], modules: Sequence[str]) -> None:
    """Heat maps, two per row, with one colour bar each."""
    columns = min(2, len(maps))
    lines = math.ceil(len(maps) / columns)
    height = min(max(3.2, 0.17 * len(layers) + 1.6), 12.0)
    figure = new_figure(columns * max(5.0, 0.42 * len(modules) + 2.2), lines * height, title)
    for number, heat_map in enumerate(maps):
        axes = figure.add_subplot(lines, columns, number + 1)
        values, scale = heat_map.views[how]
        draw_map(figure, axes, values, scale, layers, modules)
        axes.set_title(safe_label(heat_map.title), fontsize=11)
    save_figure(figure, path)


def draw_profiles(path: Path, title: str, panels: Sequence[tuple[str, Sequence[tuple[str, Floats]], bool]], layers: Sequence[str]) -> None:
    """Lines over the layers; a panel is (y title, series, whether the axis is logarithmic)."""
    figure = new_figure(4.8 * len(panels), 4.4, title)
    for number, (label, series, log) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for line, (name, values) in enumerate(series):
            style = _STYLES[line % len(_STYLES)]
            axes.plot(
                np.where(values > 0, values, np.nan) if log else values,
                color=SERIES_LIGHT[line % len(SERIES_LIGHT)],
                linestyle=style,
                label=safe_label(name),
            )
        if log and any(np.any(values > 0) for _, values in series):
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_xlabel("layer")
        label_axis(axes.xaxis, layers, 10)
        axes.grid(alpha=0.3)
        if number == 0 and series:
            axes.legend(fontsize=7)
    save_figure(figure, path)


def draw_intervals(path: Path, title: str, names: Sequence[str], values: Floats, low: Floats, high: Floats, x_title: str) -> None:
    """Horizontal bars with intervals, the first on top."""
    figure = new_figure(8.5, max(2.2, 0.3 * len(names) + 1.3))
    axes = figure.add_subplot(1, 1, 1)
    places = np.arange(len(names))
    colours = [DIVERGING_LIGHT[-1] if value > 0 else DIVERGING_LIGHT[0] for value in values]
    axes.barh(places, values, color=colours, alpha=0.75)
    axes.hlines(places, low, high, color="black", linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [safe_label(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(x_title)
    axes.set_title(safe_label(title), fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def draw_scatter(path: Path, title: str, x: Floats, y: Floats, picked: np.ndarray, labels: tuple[str, str]) -> None:
    """One point per block, with the picked blocks in colour, and the diagonal."""
    figure = new_figure(5.6, 5.2)
    axes = figure.add_subplot(1, 1, 1)
    shown = np.isfinite(x) & np.isfinite(y)
    for chosen, colour, label in ((~picked & shown, "#8a8f98", "other blocks"), (picked & shown, DIVERGING_LIGHT[-1], "topic-specific")):
        if chosen.any():
            axes.scatter(x[chosen], y[chosen], s=5, color=colour, alpha=0.6, linewidths=0, label=label)
    if shown.any():
        low, high = float(min(x[shown].min(), y[shown].min())), float(max(x[shown].max(), y[shown].max()))
        axes.plot([low, high], [low, high], color="black", linewidth=0.8)
        axes.legend(fontsize=8)
    axes.set_xlabel(safe_label(labels[0]))
    axes.set_ylabel(safe_label(labels[1]))
    axes.set_title(safe_label(title), fontsize=11)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_map(
    figure: Any, axes: Any, values: Floats, scale: Scale, layers: Sequence[str], columns: Sequence[str], column_title: str | None = None
) -> None:
    """One heat map with its colour bar; each column has its name, or columns are numbered under a title."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    stops = DIVERGING_LIGHT if scale.kind == "diverging" else SEQUENTIAL
    colours = LinearSegmentedColormap.from_list(scale.kind, stops).with_extremes(bad="#dddddd")
    norm = LogNorm(scale.low, scale.high, clip=True) if scale.log else Normalize(scale.low, scale.high, clip=True)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="both" if scale.clipped else "neither")
    bar.set_label(scale.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if column_title is None:
        axes.set_xticks(range(len(columns)), [safe_label(name) for name in columns], rotation=45, ha="right", fontsize=7)
    else:
        label_axis(axes.xaxis, columns, 24)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel(column_title, fontsize=9)
    label_axis(axes.yaxis, layers, 32)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel("layer", fontsize=9)


def label_axis(axis: Any, labels: Sequence[str], most: int) -> None:
    """Sets at most `most` of the labels, evenly spaced."""
    every = max(1, math.ceil(len(labels) / most))
    places = list(range(0, len(labels), every))
    axis.set_ticks(places, [safe_label(labels[place]) for place in places])


def new_figure(width: float, height: float, title: str = "", size: int = 13) -> Any:
    """An empty figure.

    Args:
        width, height: in inches.
        title: text above all panels.
        size: font size of the title.
    """
    from matplotlib.figure import Figure

    # A Figure without pyplot needs no global state and no window system.
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(safe_label(title), fontsize=size)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a complete PNG, or none."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", facecolor="white")


def safe_label(label: str) -> str:
    """A label that matplotlib shows literally; `$` would start a formula."""
    return "".join(sign if sign.isprintable() else "?" for sign in label).replace("$", r"\$")
