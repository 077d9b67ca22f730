"""The two figures of a life: its core metrics, and its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..html.palette import SEQUENTIAL, SERIES_LIGHT
from ..scan.figures import label_axis, new_figure, safe_label, save_figure
from .data import LifeLogFiles

_PANELS = (
    ("loss", "nats a token", ("loss",)),
    ("predictive integrity", "PI", ("pi",)),
    ("free energy", "", ("free_energy", "pi_accuracy", "pi_complexity")),
    ("τ and surprise", "", ("tau", "surprise")),
    ("used by a token or a query", "number", ("experts_per_token", "heads_per_token", "blocks_per_query")),
    ("routing accuracy", "share", ("routing_accuracy",)),
)
_MOST_MAPS = 8


def draw_core(path: Path, data: LifeLogFiles) -> None:
    """Core metrics over steps, six panels."""
    figure = new_figure(13.0, 6.4, "Core metrics")
    for number, (title, label, names) in enumerate(_PANELS):
        axes = figure.add_subplot(2, 3, number + 1)
        drawn = [name for name in names if np.isfinite(data.series(name)).any()]
        for place, name in enumerate(drawn):
            axes.plot(data.steps, data.series(name), color=SERIES_LIGHT[place % len(SERIES_LIGHT)], label=name.replace("_", " "))
        if number == 0 and data.evaluations:
            steps = [line["step"] for line in data.evaluations]
            axes.plot(steps, [line["eval_loss"] for line in data.evaluations], "o-", color=SERIES_LIGHT[1], ms=3, label="held-out loss")
        _finish(axes, title, label)
    save_figure(figure, path)


def draw_experts(path: Path, data: LifeLogFiles) -> None:
    """Births and recyclings over steps, and the choices of the first layers over time."""
    layers = list(data.choices)[:_MOST_MAPS]
    columns = 3
    rows = 1 + -(-max(1, len(layers)) // columns)
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(13.0, 3.4 * rows, "Experts")
    axes = figure.add_subplot(rows, columns, 1)
    axes.plot(data.steps, data.series("live_experts"), color=SERIES_LIGHT[0], label="live experts, all layers")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "population", "number")
    axes = figure.add_subplot(rows, columns, 2)
    for place, kind in enumerate(("birth", "recycling")):
        axes.plot(data.steps, data.population(kind), color=SERIES_LIGHT[place], label=f"{kind}s")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "births and recyclings", "up to a step")
    axes = figure.add_subplot(rows, columns, 3)
    ages = [data.step - expert.birth_step for expert in data.experts if expert.live and expert.birth_step >= 0]
    axes.hist(ages, bins=20, color=SERIES_LIGHT[0])
    axes.set_title("age of live experts", fontsize=11)
    axes.set_xlabel("steps")
    for number, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, columns + 1 + number)
        steps, values = data.shares(layer)
        axes.imshow(values, aspect="auto", cmap=_colours(), vmin=0, vmax=max(2.0, float(np.quantile(values, 0.99))))
        axes.set_title(safe_label(layer), fontsize=9)
        axes.set_xlabel("expert")
        axes.set_ylabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_axis(axes.yaxis, steps, 8)
    save_figure(figure, path)


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("choices", list(SEQUENTIAL))


def _finish(axes: Any, title: str, label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
