"""`life.html` and two figures: losses and predictive integrity of a training, and the population of its experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..._io.files import write_atomically
from ..html.charts import line_chart
from ..html.maps import HeatMap, make_map
from ..html.page import card, facts, group, map_card, maps_data, notices, page, section, table_card, terms, text, view_controls
from ..scan.grid import Floats
from .data import LifeLogFiles, thinned
from .figures import draw_core, draw_experts

MOST_ROWS = 300

# Title, y title, whether the axis is logarithmic, and the metrics of each chart with their names.
CORE: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "nats a token", False, (("loss", "training"), ("eval_loss", "held-out"))),
    ("Predictive integrity", "PI", False, (("pi", "PI"),)),
    ("Free energy", "α-weighted", False, (("free_energy", "sum"), ("pi_accuracy", "accuracy"), ("pi_complexity", "complexity"))),
    ("Uncertainty", "τ, nats", False, (("tau", "entropy of the output"),)),
    ("Surprise", "of a token's experts", False, (("surprise", "mean"),)),
    ("Routing accuracy", "share of tokens", False, (("routing_accuracy", "best-scored expert had the least surprise"),)),
    ("Experts and heads a token", "number", False, (("experts_per_token", "experts"), ("heads_per_token", "heads"))),
    ("Unserved tokens", "share", False, (("unserved", "passed no expert's threshold"),)),
    ("Key blocks a query", "number", False, (("blocks_per_query", "all"), ("far_blocks_per_query", "far ones"))),
    ("Gradient", "norm before clipping", True, (("grad_norm", "all weights"),)),
)
MEANINGS = {
    "PI": "predictive integrity, exp(−(accuracy + complexity)): 1 for a model that predicts well and would change little",
    "accuracy": "α (1 − γ) loss / τ, the loss in units of the model's own uncertainty",
    "complexity": "α γ surprise, how much the experts that ran would have to change",
    "τ": "mean entropy of the output distribution",
    "surprise": "norm of the gradient that a token alone causes in one of its experts",
    "routing accuracy": "share of tokens whose best-scored expert had the least surprise; an expert with more weight has more surprise, so "
    "this is below chance unless routers learn from surprise (w_ce, w_kl)",
    "birth": "an inactive expert was woken for tokens that passed no expert's threshold",
    "recycling": "a live expert that hardly any token used was reset",
}


def write_life_page(folder: Path) -> Path:
    """Writes FOLDER/life.html from FOLDER/log, and core.png and experts.png where matplotlib is installed.

    Returns:
        The page.
    """
    data = LifeLogFiles(folder)
    body = [
        notices(_notes(data)),
        section("now", "Now", _now(data)),
        section("core", "Core metrics", group("grid3", [one for chart in CORE if (one := _chart(data, *chart))]) + terms(MEANINGS)),
        section("experts", "Experts", _experts(data)),
    ]
    maps = _maps(data)
    if maps:
        lead = "How often each expert was chosen, in units of its layer's mean: 1 is a fair share. Rows are periods that end at a step."
        controls = view_controls("none", "units of the layer's mean.", by_layer="each period is scaled by itself.")
        cards = group("grid2", [map_card(one) for one, _, _ in maps])
        body.append(section("choices", "Choices over time", controls + cards, lead=lead))
    if data.sample and data.sample.get("text"):
        lead = "Sampled from the model after training, without a prompt."
        body.append(section("sample", "Sample", f'<div class="card"><pre>{text(data.sample["text"])}</pre></div>', lead=lead))
    numbers = [part for one, rows, columns in maps for part in maps_data([one], rows, columns, columns)]
    for part in numbers:
        part["rowTitle"] = "step"
    target = folder / "life.html"
    subtitle = f"{data.steps[-1]:,} steps" if data.steps else "No step yet"
    write_atomically(target, page(f"Life of {folder.resolve().name}", f"{subtitle}.", body, {"maps-data": numbers}))
    if data.metrics and importlib.util.find_spec("matplotlib") is not None:
        draw_core(folder / "core.png", data)
        draw_experts(folder / "experts.png", data)
    return target


def _notes(data: LifeLogFiles) -> list[str]:
    notes = []
    if data.sample is None:
        notes.append("Training is running, or was killed; this page shows what was logged so far.")
    elif data.sample.get("stopped"):
        notes.append(f"Training stopped before its last step: {data.sample['stopped']}.")
    skipped = int(np.nansum(data.series("skipped_steps"))) if data.metrics else 0
    if skipped:
        notes.append(f"{skipped} steps were skipped, because their loss or gradients were not finite.")
    return notes


def _now(data: LifeLogFiles) -> str:
    last = data.metrics[-1] if data.metrics else {}
    live = [expert for expert in data.experts if expert.live]
    found: dict[str, object] = {
        "step": last.get("step"),
        "loss": last.get("loss"),
        "held-out loss": data.evaluations[-1]["eval_loss"] if data.evaluations else None,
        "PI": last.get("pi"),
        "live experts": f"{len(live):,} of {len(data.experts):,}",
        "births": sum(event["kind"] == "birth" for event in data.events),
        "recyclings": sum(event["kind"] == "recycling" for event in data.events),
    }
    return facts(found)


def _chart(data: LifeLogFiles, title: str, y_title: str, log: bool, parts: Sequence[tuple[str, str]]) -> str:
    series = []
    for metric, name in parts:
        values = _held_out(data) if metric == "eval_loss" else data.series(metric)
        if np.isfinite(values).any():
            series.append((name, values))
    if not series and data.metrics:
        return ""  # the model has no such thing
    rows, means = thinned(data.steps, [values for _, values in series])
    lines = [(name, one) for (name, _), one in zip(series, means, strict=True)]
    return card(title, line_chart(title, rows, lines, x_title="step", y_title=y_title, log=log))


def _held_out(data: LifeLogFiles) -> Floats:
    """Held-out loss at the first line of training from each evaluation on; NaN elsewhere."""
    found = np.full(len(data.metrics), np.nan)
    for line in data.evaluations:
        place = int(np.searchsorted(data.steps, line["step"]))
        if place < len(found):
            found[place] = line["eval_loss"]
    known = np.flatnonzero(np.isfinite(found))
    if len(known) > 1:  # a line between them
        inside = np.arange(known[0], known[-1] + 1)
        found[inside] = np.interp(inside, known, found[known])
    return found


def _experts(data: LifeLogFiles) -> str:
    charts = []
    population = [("live experts", data.series("live_experts"))]
    turnover = [("births", data.population("birth")), ("recyclings", data.population("recycling"))]
    for title, y_title, series in (
        ("Live experts", "with heads, all layers", population),
        ("Births and recyclings", "up to a step", turnover),
    ):
        rows, means = thinned(data.steps, [values for _, values in series])
        lines = [(name, one) for (name, _), one in zip(series, means, strict=True)]
        charts.append(card(title, line_chart(title, rows, lines, x_title="step", y_title=y_title)))
    head = ("layer", "expert", "state", "born at step", "age", "experts of this slot", "tokens", "tokens a step", "surprise a token")
    rows_of = []
    for expert in data.experts:
        if expert.birth_step < 0:
            continue
        age = max(data.step - expert.birth_step, 1)
        each = expert.surprise / expert.activations if expert.activations else float("nan")
        state = "live" if expert.live else "inactive"
        rows_of.append(
            (expert.layer, expert.number, state, expert.birth_step, age, expert.lives, expert.activations, expert.activations / age, each)
        )
    rows_of.sort(key=lambda row: (-float(row[3]), str(row[0]), int(row[1])))  # the youngest first
    shown = rows_of[:MOST_ROWS]
    more = "" if len(shown) == len(rows_of) else f", the {MOST_ROWS} youngest of {len(rows_of):,}"
    lives = table_card(head, shown, f"Experts that have lived{more}; surprise of the batch's mean loss", numeric=tuple(range(3, 9)))
    events = [(event["step"], event["layer"], event["kind"], event["expert"], event["share"], event["age"]) for event in data.events[::-1]]
    log = table_card(
        ("step", "layer", "event", "expert", "share of tokens", "age"), events[:MOST_ROWS], "The last births and recyclings",
        numeric=(0, 3, 4, 5),
    )  # fmt: skip
    return group("grid3", charts) + group("grid-tables", [lives, log] if events else [lives])


def _maps(data: LifeLogFiles) -> list[tuple[HeatMap, list[str], list[str]]]:
    """A map of each layer's choices, with the names of its rows and columns."""
    found = []
    for number, layer in enumerate(data.choices):
        rows, values = data.shares(layer)
        title = f"Choices in {layer}"
        one = make_map(f"choices-{number}", title, "", "times the mean", values, signed=False)
        found.append((one, rows, [str(expert) for expert in range(values.shape[1])]))
    return found
