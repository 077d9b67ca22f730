"""Page of one plasticity run: importance of the heads before training, and their change by training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.files import write_atomically
from ..._io.units import counted
from ...errors import InputError
from ...heads import study
from ...heads.step_files import read_json
from ..html import charts
from ..html.charts import DotRow, Points
from ..html.maps import HeatMap
from ..html.page import card, facts, group, notices, section, table, table_card, terms, text
from ..scan import figures
from ..scan.report import ReportResult
from . import plasticity_parts as parts
from .figures import HeadScatter, draw_head_map, draw_head_scatters, draw_statistics
from .files import HeadColumns, option_facts, plain_facts, read_heads
from .plasticity_limits import MeasuredRows, limits_of_numbers, limits_of_rows, read_rows
from .shell import head_page, model_title

_ACCEPTANCE_LEAD = (
    "The hypothesis is that importance before training hardly predicts which heads training changes. These six limits express it; they "
    "are chosen, not measured. The last column is the average of each figure for unrelated importance and change."
)
_LOSS_POINTS = 100
_WHEN = {"pre": "before", "post": "after"}
# Figure -> its panels: column against I_pre, title, title of the y axis.
SCATTERS = {
    study.FIG_UPDATE: (
        ("U", "Importance and update", "U, change of the head's weights"),
        ("Urel", "Importance and relative update", "Urel, change relative to the weights"),
    ),
    study.FIG_GRADIENT: (("G_pre", "Importance and gradient", "G_pre, gradient norm before training"),),
}


def write_plasticity_page(folder: str | os.PathLike[str], *, figures_too: bool = True) -> ReportResult:
    """Writes index.html and the PNGs of a plasticity run, from the files of its steps.

    Args:
        folder: OUTPUT/TASK/seedN with heads.csv, stats.json, cases.json, measure.json and train.json.
        figures_too: whether to draw fig_I_vs_U.png, fig_I_vs_G.png, fig_stats.png, map_I_pre.png, map_I_post.png and map_Urel.png; needs
            matplotlib.

    Raises:
        InputError: a file is missing or not as its step writes it (the message names it), or matplotlib is missing.
    """
    root = Path(folder)
    if figures_too:
        figures.require_matplotlib("figures_too=False")
    names = ["I_pre", "I_post", "accuracy_drop_pre", "accuracy_drop_post", "taylor_pre", "taylor_abs_pre", "U", "Urel", "G_pre"]
    heads = read_heads(root / study.HEADS, names, study.REPORT_STEP, ["kind"])
    stats, cases = read_json(root / study.STATS, dict, study.REPORT_STEP), read_json(root / study.CASES, dict, study.REPORT_STEP)
    measured = read_json(root / study.MEASURED, dict, study.MEASURE_STEP)
    trained = read_json(root / study.TRAINED, dict, study.TRAIN_STEP, study.TRAIN_AGAIN)
    rows = read_rows(root)
    maps = [parts.column_map(heads, key) for key in parts.MAPS]
    try:
        content = _page(heads, stats, cases, measured, trained, rows, maps)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{root} must hold stats.json and cases.json as the report step writes them, got {error!r}; run {study.REPORT_STEP}."
        ) from error
    drawn = _draw(root, heads, stats, cases, maps) if figures_too else ()
    write_atomically(root / study.PAGE, content)
    return ReportResult(root / study.PAGE, drawn)


def _model(stats: Mapping[str, Any]) -> str:
    return model_title(stats["model"], stats["options"]["model_path"])


def case_points(heads: HeadColumns, x: str, y: str) -> list[Points]:
    """Heads as three groups of points: no case, and the two kinds of cases."""
    kinds = np.array(heads.words["kind"])
    groups = []
    for kind, shape in (("", "circle"), (parts.STATIC, "square"), (parts.PLASTIC, "triangle")):
        lines = np.flatnonzero(kinds == kind)
        labels = [f"layer {layer} head {head}" for layer, head in (heads.places[line] for line in lines)]
        groups.append(Points(kind or "other heads", heads.columns[x][lines], heads.columns[y][lines], labels, shape))
    return groups


def _percentile_marks(cases: Mapping[str, Any], column: str) -> list[tuple[str, float]]:
    """Lines that separate cases: for I_pre and Urel, none for other columns."""
    edges = cases["thresholds"]
    return [(f"p{cases[side]:g}", edges[f"{column}_{side}"]) for side in ("low", "high") if f"{column}_{side}" in edges]


def _dot_rows(stats: Mapping[str, Any]) -> tuple[list[DotRow], list[DotRow]]:
    rhos, overlaps = [], []
    for pair in stats["pairs"]:
        name, overlap, judged = parts.pair_name(pair), pair["overlap"], parts.is_judged(pair, stats)
        rhos.append(DotRow(name, pair["rho"], pair["low"], pair["high"], judged=judged))
        overlaps.append(DotRow(name, overlap["share"], chance=overlap["chance"], judged=judged))
    return rhos, overlaps


def _draw(root: Path, heads: HeadColumns, stats: Mapping[str, Any], cases: Mapping[str, Any], maps: Sequence[HeatMap]) -> tuple[Path, ...]:
    where = f"{_model(stats)} on {stats['task']}"
    drawn = []
    for name, panels in SCATTERS.items():
        drawn.append(root / name)
        x_marks = _percentile_marks(cases, "I_pre")
        plots = [
            HeadScatter(title, case_points(heads, "I_pre", column), y_title, x_marks, _percentile_marks(cases, column))
            for column, title, y_title in panels
        ]
        draw_head_scatters(drawn[-1], where, plots, "I_pre, loss increase without the head (nats)")
    drawn.append(root / study.FIG_STATS)
    draw_statistics(drawn[-1], f"Importance and change: {where}", *_dot_rows(stats), parts.study_limits(stats))
    for heat_map in (heat_map for heat_map in maps if heat_map.key in study.MAP_FILES):
        drawn.append(root / study.MAP_FILES[heat_map.key])
        draw_head_map(drawn[-1], heat_map.title, where, heat_map, "none", heads.layers, heads.num_heads)
    return tuple(drawn)


def _page(
    heads: HeadColumns,
    stats: Mapping[str, Any],
    cases: Mapping[str, Any],
    measured: dict[str, Any],
    trained: dict[str, Any],
    rows: MeasuredRows,
    maps: Sequence[HeatMap],
) -> str:
    measured_values = (
        "the values of heads.csv. Importance keeps its zero: the model needs the heads in warm colours and is better without those in blue."
    )
    no_cases = [f"There are no cases: {cases['reason']}."] if cases["reason"] else []
    body = [
        notices([*limits_of_rows({"": rows}), *limits_of_numbers(stats), *no_cases]),
        _verdict(stats),
        section("run", "Run", _run(stats, measured, trained, rows)),
        _acceptance(stats, trained),
        _statistics(stats),
        _scatters(heads, cases),
        parts.column_maps_section(maps, measured_values),
        _cases(cases),
        _tops(heads, int(stats["top_k"])),
        section("terms", "Terms", terms(parts.MEANINGS)),
    ]
    front = [_model(stats), *([] if stats["seed"] is None else [f"seed {stats['seed']}"])]
    return head_page(f"What training on {stats['task']} does to heads", front, body, heads, maps)


def _acceptance_table(stats: Mapping[str, Any]) -> str:
    """Table of the acceptance figures of one run."""
    verdicts = {True: "✓ met", False: "✗ not met", None: "not defined"}
    cells = []
    for row in stats["acceptance"]:
        figure, rule = parts.figure_cells(row)
        cells.append([figure, verdicts[row["met"]], rule, parts.found_number(row["value"]), parts.if_unrelated(row["figure"], stats)])
    return table(["figure", "verdict", "wanted", "found", "if unrelated"], cells, numeric=(3, 4))


def _verdict(stats: Mapping[str, Any]) -> str:
    rows = stats["acceptance"]
    met = sum(row["met"] is True for row in rows)
    counts = stats["counts"]
    first = stats["pairs"][1]
    rho = "is not defined" if first["rho"] is None else f"is {first['rho']:.2f}"
    line = (
        f"The rank correlation of importance before training with the relative update {rho}. Of {counts['heads']} heads, "
        f"{counts['important_but_static']} are important but static and {counts['plastic_but_unimportant']} plastic but unimportant. "
        f"{met} of the {len(rows)} expectations {'is' if met == 1 else 'are'} met."
    )
    return f'<p class="verdict">{text(line)}</p>'


def _run(stats: Mapping[str, Any], measured: dict[str, Any], trained: dict[str, Any], rows: MeasuredRows) -> str:
    def change(name: str) -> str | None:
        before, after = (measured.get(f"base_{name}_{when}") for when in ("pre", "post"))
        return None if before is None or after is None else f"{before:.4f} → {after:.4f}"

    seconds = [run.get("seconds") for run in (trained, measured)]
    values = {
        "model": stats["model"],
        "task": stats["task"],
        "seed": stats["seed"],
        "rows trained on": trained.get("train_rows"),
        "rows measured": measured.get("samples"),
        "rows without a label, left out": trained.get("unlabelled_rows") or None,
        "steps of training": trained.get("steps"),
        "accuracy, before → after": change("accuracy"),
        "commonest class measured": rows.told,
        "loss, before → after": change("loss"),
        "training, measuring, seconds": " and ".join(
            f"{number:,.1f}" if number < 9.95 else f"{number:,.0f}" for number in seconds if number is not None
        ),
    }
    folded = [
        ("Options of training", option_facts(trained.get("options", {}))),
        ("Everything in train.json", plain_facts(trained)),
        ("Everything in measure.json", plain_facts(measured)),
    ]
    return facts(values) + "".join(f"<details><summary>{text(title)}</summary>{facts(found)}</details>" for title, found in folded if found)


def _acceptance(stats: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    cards = [f'<div class="card">{_acceptance_table(stats)}</div>', _training(trained)]
    lead = f"{_ACCEPTANCE_LEAD} {parts.judged_line(stats)}"
    return section("acceptance", "Expectations", group("grid2", cards), lead=lead)


def _training(trained: Mapping[str, Any]) -> str:
    losses = np.array([loss for loss in trained.get("losses", []) if isinstance(loss, int | float)], dtype=np.float64)
    if len(losses) < 2:
        return ""
    each = math.ceil(len(losses) / _LOSS_POINTS)
    means = np.array([losses[first : first + each].mean() for first in range(0, len(losses), each)])
    steps = [str(min(first + each, len(losses))) for first in range(0, len(losses), each)]
    chart = charts.line_chart("Loss of training", steps, [("loss", means)], x_title="step", y_title="loss, nats", zero=True)
    return card("Training", chart, legend=f"Mean over every {each} steps." if each > 1 else "Every step.")


def _statistics(stats: Mapping[str, Any]) -> str:
    interval = stats["interval"]
    legends = (
        f"{interval['confidence']:.0%} intervals: {interval['resamples']:,} resamples of the heads.",
        f"Of the {stats['pairs'][0]['overlap']['k']} highest heads by either. A cross is the value by chance.",
    )
    head = ["columns", "ρ", "from", "to", "p", "overlap", "shared", "of", "by chance", "note"]
    rows = [_pair_row(pair) for pair in [*stats["pairs"], *stats["taylor"]]]
    return parts.statistics_section(*_dot_rows(stats), stats, legends, head, rows)


def _pair_row(pair: Mapping[str, Any]) -> list[object]:
    overlap = pair["overlap"]
    p = None if pair["p"] is None else f"{pair['p']:.2g}" if pair["p"] >= 1e-300 else "< 1e-300"
    shares = [parts.decimals(overlap["share"]), overlap["shared"], overlap["k"], parts.decimals(overlap["chance"])]
    return [
        parts.pair_name(pair),
        *map(parts.decimals, (pair["rho"], pair["low"], pair["high"])),
        p,
        *shares,
        pair["reason"] or overlap["reason"] or "",
    ]


def _scatters(heads: HeadColumns, cases: Mapping[str, Any]) -> str:
    cards = []
    for column, title, y_title in (panel for panels in SCATTERS.values() for panel in panels):
        chart = charts.scatter(
            title,
            case_points(heads, "I_pre", column),
            x_title="I_pre, loss increase in nats",
            y_title=y_title,
            x_marks=_percentile_marks(cases, "I_pre"),
            y_marks=_percentile_marks(cases, column),
        )
        cards.append(card(title, chart))
    lead = "Each point is one head. Dashed lines are the percentiles that define the cases."
    return section("scatter", "Every head", group("grid3", cards), lead=lead)


def _cases(cases: Mapping[str, Any]) -> str:
    head = ["layer", "head", "I_pre", "I_post", "U", "Urel", "G_pre"]
    listed = {}
    for kind, key in parts.KEYS.items():
        rows = [[case[name] for name in head] for case in cases[key]]
        listed[kind] = rows, counted(len(rows), "head")
    lead = f"High means at or above percentile {cases['high']:g}, low at or below percentile {cases['low']:g}, over all heads."
    return parts.cases_section(head, listed, "No head is a case.", lead)


def _tops(heads: HeadColumns, top: int) -> str:
    cards = []
    for column, title, when in (
        ("I_pre", "Most important before training", "pre"),
        ("I_post", "Most important after training", "post"),
        ("Urel", "Most changed", "post"),
    ):
        order = np.argsort(-heads.columns[column], kind="stable")[:top]
        rows: list[list[object]] = []
        for rank, line in enumerate(order.tolist(), start=1):
            numbers = [heads.columns[name][line] for name in ("I_pre", "I_post", f"accuracy_drop_{when}", "Urel")]
            rows.append([rank, *heads.places[line], *numbers, heads.words["kind"][line]])
        head = ["#", "layer", "head", "I_pre", "I_post", f"accuracy drop {_WHEN[when]}", "Urel", "case"]
        cards.append(table_card(head, rows, title, of="head", numeric=range(7)))
    return section("top", "Highest heads", group("grid-tables", cards))
