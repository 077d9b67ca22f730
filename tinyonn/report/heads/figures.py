"""Figures of attention heads as PNG files, in matplotlib's default colours: heat maps, importance against change, statistics."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..html.charts import DotRow, Points, bent_ticks, format_number, linear_width
from ..html.maps import HeatMap, Normalisation
from ..scan.figures import draw_map, new_figure, safe_label, save_figure

_MANY = 800  # from this number of heads, points are drawn smaller
_POWERS = (-2, 4)  # powers of ten outside of which the axis title holds a shared one
_LETTERS = 10  # letters of a map's title per inch of the figure
_MARKERS = {"circle": "o", "square": "s", "triangle": "^"}


def draw_head_map(path: Path, title: str, where: str, heat_map: HeatMap, how: Normalisation, layers: Sequence[str], num_heads: int) -> None:
    """One map of layers × heads, input layer on top, with the model and data below its title."""
    width = min(max(4.6, 0.3 * num_heads + 2.2), 11.0)
    figure = new_figure(width, min(max(3.0, 0.26 * len(layers) + 1.5), 9.0))
    axes = figure.add_subplot(1, 1, 1)
    values, scale = heat_map.views[how]
    draw_map(figure, axes, values, scale, layers, [str(head) for head in range(num_heads)], "head")
    lines = [*textwrap.wrap(title, int(_LETTERS * width)), *textwrap.wrap(where, int(_LETTERS * width))]
    axes.set_title("\n".join(map(safe_label, lines)), fontsize=9)
    save_figure(figure, path)


@dataclass(frozen=True)
class HeadScatter:
    """One panel: groups of heads, the title of the y axis, and named lines across both axes."""

    title: str
    groups: Sequence[Points]
    y_title: str
    x_marks: Sequence[tuple[str, float]]
    y_marks: Sequence[tuple[str, float]]


def draw_head_scatters(path: Path, title: str, plots: Sequence[HeadScatter], x_title: str) -> None:
    """One point per head, with a marker and a colour per group and dashed lines at the marks; panels side by side."""
    figure = new_figure(5.4 * len(plots) + 0.6, 5.0, title, 12)
    for number, plot in enumerate(plots, start=1):
        axes = figure.add_subplot(1, len(plots), number)
        size = 26 if sum(len(group.x) for group in plot.groups) < _MANY else 9
        for group in plot.groups:
            label = safe_label(f"{group.name} ({len(group.x):,})")
            axes.scatter(group.x, group.y, marker=_MARKERS[group.shape], s=size, alpha=0.75, linewidths=0, label=label)
        axes.set_xlabel(safe_label(x_title))
        axes.set_ylabel(safe_label(plot.y_title))
        _label_ticks(axes, "x", np.concatenate([group.x for group in plot.groups]))
        _label_ticks(axes, "y", np.concatenate([group.y for group in plot.groups]))
        small: dict[str, Any] = {"fontsize": 7, "color": "0.3"}
        for name, value in plot.x_marks:
            axes.axvline(value, color="0.4", linestyle="--", linewidth=0.9)
            axes.text(value, 1.01, safe_label(name), transform=axes.get_xaxis_transform(), ha="center", va="bottom", **small)
        for name, value in plot.y_marks:
            axes.axhline(value, color="0.4", linestyle="--", linewidth=0.9)
            axes.text(1.01, value, safe_label(name), transform=axes.get_yaxis_transform(), ha="left", va="center", **small)
        axes.set_title(safe_label(plot.title), fontsize=11, pad=16)
        axes.grid(alpha=0.3)
        if number == 1:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_statistics(
    path: Path, title: str, correlations: Sequence[DotRow], overlaps: Sequence[DotRow], limits: tuple[float, float]
) -> None:
    """Rank correlations with intervals, and overlaps with chance; dashed lines at the expected limits, across the rows that they judge."""
    figure = new_figure(9.0, 1.8 + 0.5 * len(correlations), title, 12)
    figure.get_layout_engine().set(wspace=0.06)  # keeps tick labels of the two panels apart
    places = np.arange(len(correlations))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in zip(places, correlations, strict=True):
        if row.value is None:
            left.text(-0.97, place, "not defined", fontsize=8, va="center")
            continue
        if row.low is not None and row.high is not None:
            left.plot([row.low, row.high], [place, place], color="C0", linewidth=1.6)
        left.plot([row.value], [place], "o", color="C0", markersize=7)
    judged = places[[row.judged for row in correlations]]
    expected_limits = f"expected limits, {limits[0]:g} and {limits[1]:g}"
    known = [row for row in overlaps if row.value is not None]
    for place, row in zip(places, overlaps, strict=True):
        if row.value is None:
            right.text(0.02, place, "not defined", fontsize=8, va="center")
            continue
        right.barh([place], [row.value], height=0.5, color="C0")
        right.plot([row.chance], [place], "x", color="black", markersize=7, label="by chance" if row is known[0] else None)
    for axes, limit, span, label in (
        (left, limits[0], (-1.02, 1.02), "Spearman's ρ with its interval"),
        (right, limits[1], (0.0, 1.02), "overlap of the highest heads"),
    ):
        across = np.full(len(judged), limit)
        axes.vlines(across, judged - 0.5, judged + 0.5, colors="C3", linestyles="--", linewidth=1.0, label=expected_limits)
        axes.set_xlim(*span)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=8)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(places, [safe_label(row.name) for row in correlations])
    left.set_ylim(len(correlations) - 0.5, -0.5)
    save_figure(figure, path)


def _label_ticks(axes: Any, name: str, values: np.ndarray) -> None:
    """Sets few ticks with short labels; the axis title holds a shared power of ten or offset."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axis = getattr(axes, f"{name}axis")
    width = linear_width(values)
    if width is not None:
        getattr(axes, f"set_{name}scale")("asinh", linear_width=width)
        ticks = bent_ticks(float(values.min()), float(values.max()), width)
        axis.set_ticks(ticks, [format_number(tick) for tick in ticks], minor=False)
        axis.set_ticks([], minor=True)
        return
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits(_POWERS)
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(formatter)
    formatter.set_locs(axis.get_majorticklocs())
    if formatter.get_offset():
        axis.set_label_text(f"{axis.get_label_text()} ({formatter.get_offset()})")
        axis.offsetText.set_visible(False)
