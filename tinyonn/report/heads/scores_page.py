"""Page of a score run: maps of the scores over layers and heads, and the highest heads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.config import read_yaml
from ..._io.files import write_atomically
from ..._io.units import counted
from ...errors import InputError, listed, reason, shown
from ...heads.step_files import read_json
from ...heads.study import NORM_COLUMNS
from ..html import charts
from ..html.maps import HeatMap, Normalisation, Scale, choose_scale, make_map
from ..html.page import card, facts, group, maps_section, section, table_card, view_controls
from ..scan import figures
from ..scan.grid import Floats
from ..scan.report import ReportResult
from .figures import draw_head_map
from .files import HeadColumns, option_facts, plain_facts, read_heads
from .shell import head_page, model_title, short_data

_STEP = "tinyonn heads score"
SCORES = {
    "out": (
        "Output norm",
        "norm of the head's output",
        "Size of a head's output: L2 norm of its slice of the input of the output projection.",
    ),
    "ent": (
        "Concentration",
        "negative entropy, nats",
        "Concentration of the head's attention: negative entropy over keys. At 0, it attends to one token only.",
    ),
    "task": ("Attention to the question", "share of attention", "Share of the head's attention on the tokens of the question."),
}
_OUT_PROJECTED = (
    "Output norm",
    "norm after the output projection",
    "Size of a head's part of the layer's output: L2 norm of its slice after the output projection.",
)
_WEIGHTS = {"ent": "lambda_ent", "task": "lambda_task"}
# Keys of summary.json that need an explanation -> what they count.
_COUNTS = {
    "rows": "rows in the data",
    "samples": "rows scored",
    "unlabelled": "rows without an answer, left out",
    "answered": "of these, with an answer key",
    "tokens": "tokens in all prompts",
    "truncated": "prompts cut at max length",
    "spans lost": "prompts without their whole question",
}
# Normalisation in scores_norm.csv.
_BY_LAYER = {
    "zscore": "standard deviations from the layer's mean, (x − mean) / std, as in scores_norm.csv.",
    "percentile": (
        "share of the layer's other heads with a lower score (equal scores count half), (rank − 1) / (heads − 1), as in scores_norm.csv."
    ),
}
_LAYER_COLUMNS = 8


def write_scores_page(folder: str | os.PathLike[str], *, figures_too: bool = True) -> ReportResult:
    """Writes index.html and one PNG per map from the files of `tinyonn heads score`.

    Args:
        folder: folder with scores_raw.csv, scores_norm.csv, scores_combined.csv, the two lists of top heads, summary.json and config.yaml.
        figures_too: whether to draw map_out.png, map_ent.png, map_task.png and map_combined.png; needs matplotlib.

    Raises:
        InputError: a file is missing or not as the command writes it (the message names it), or matplotlib is missing.
    """
    root = Path(folder)
    if figures_too:
        figures.require_matplotlib("figures_too=False")
    raw = read_heads(root / "scores_raw.csv", [f"{name}_raw" for name in SCORES], _STEP)
    scores = [name.removesuffix("_raw") for name in raw.columns]
    config = read_yaml(root / "config.yaml")
    lacking = [name for name in ("norm_mode", "out_projection", "extra_weights", *_WEIGHTS.values()) if name not in config]
    if lacking:
        raise InputError(f"{root / 'config.yaml'} has no {listed(lacking)}; run {_STEP} again.")
    if str(config["norm_mode"]) not in NORM_COLUMNS:
        raise InputError(f"{root / 'config.yaml'} must have norm_mode {' or '.join(NORM_COLUMNS)}, got {shown(config['norm_mode'])}.")
    norm = _normalised(root / "scores_norm.csv", scores, config["norm_mode"])
    combined = read_heads(root / "scores_combined.csv", ["combined"], _STEP)
    for name, other in (("scores_norm.csv", norm), ("scores_combined.csv", combined)):
        if other.places != raw.places:
            raise InputError(f"{root / name} must have the heads of scores_raw.csv in its order; run {_STEP} again.")
    summary = read_json(root / "summary.json", dict, _STEP)
    tops = read_json(root / "topk_global.json", list, _STEP), read_json(root / "topk_per_layer.json", dict, _STEP)
    maps = score_maps(raw, norm, combined, config)
    drawn = []
    if figures_too:
        where = f"{model_title(summary.get('model'), config.get('model_path'))} on {short_data(summary.get('data'))}"
        for heat_map in maps:
            drawn.append(root / f"map_{heat_map.key}.png")
            title = f"{heat_map.title}, {'by layer' if 'layer' in heat_map.views else 'weighted sum of ranks'}"
            draw_head_map(drawn[-1], title, where, heat_map, _first_view(heat_map), raw.layers, raw.num_heads)
    try:
        content = _page(raw, norm, maps, summary, config, *tops)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"The lists of top heads in {root} must be heads of scores_raw.csv, got {reason(repr(error), 80)}; run {_STEP} again."
        ) from error
    write_atomically(root / "index.html", content)
    return ReportResult(root / "index.html", tuple(drawn))


def _normalised(path: Path, scores: Sequence[str], mode: str) -> HeadColumns:
    """scores_norm.csv with the names of the scores as columns. In folders of earlier versions, columns of percentiles end in _z too."""
    found = read_heads(path, [], _STEP)
    ending = NORM_COLUMNS[mode]
    if mode == "percentile" and all(f"{name}_z" in found.columns for name in scores):
        ending = "z"
    names = {name: f"{name}_{ending}" for name in scores}
    if any(column not in found.columns for column in names.values()):
        read_heads(path, [*names.values()], _STEP)  # raises with the missing columns
    return replace(found, columns={name: found.columns[column] for name, column in names.items()})


def score_maps(raw: HeadColumns, norm: HeadColumns, combined: HeadColumns, config: Mapping[str, Any]) -> list[HeatMap]:
    """One map per score, as measured, normalised by layer as in the run, and over the whole map; and a map of the combined score.

    Args:
        raw, norm, combined: the three tables, of the same heads.
        config: options of the run.
    """
    maps = []
    described = SCORES | ({"out": _OUT_PROJECTED} if config["out_projection"] else {})
    for key in (name.removesuffix("_raw") for name in raw.columns):
        title, unit, legend = described.get(key, (key, "as measured", "A registered score of this run."))
        heat_map = make_map(key, title, legend, unit, raw.grid(f"{key}_raw"), signed=False)
        values = norm.grid(key)
        scale = choose_scale(values, "layer", unit, signed=False)
        if config["norm_mode"] == "percentile":
            scale = Scale("sequential", False, 0.0, 1.0, False, "share of the layer's other heads below it")
        maps.append(replace(heat_map, views={**heat_map.views, "layer": (values, scale)}))
    values = combined.grid("combined")
    unit = "weighted sum of ranks"
    views: dict[Normalisation, tuple[Floats, Scale]] = {"none": (values, choose_scale(values, "none", unit, signed=False))}
    return [*maps, HeatMap("combined", "Combined score", _fusion(config), unit, False, values, views)]


def _fusion(config: Mapping[str, Any]) -> str:
    """Formula of the combined score with the run's weights."""
    weights = {name: config[option] for name, option in _WEIGHTS.items()} | config["extra_weights"]
    formula = " + ".join(["rank(out)", *(f"{weight:g}·rank({name})" for name, weight in weights.items())])
    rest = "weighted sum of a head's ranks within its layer, where 1 is the lowest. Any of the scores can make it high."
    return f"{formula}: {rest}"


def _first_view(heat_map: HeatMap) -> Normalisation:
    return "layer" if "layer" in heat_map.views else "none"


def _page(
    raw: HeadColumns,
    norm: HeadColumns,
    maps: list[HeatMap],
    summary: dict[str, Any],
    config: dict[str, Any],
    top_global: list[Any],
    top_layers: dict[str, Any],
) -> str:
    run = facts({_COUNTS.get(name, name): value for name, value in plain_facts(summary).items()})
    measured = "the values of scores_raw.csv. The combined score is the same in all three."
    body = [
        section("run", "Run", f"{run}<details><summary>Options</summary>{facts(option_facts(config))}</details>"),
        maps_section(
            "Layers and heads",
            maps,
            controls=view_controls("layer", measured, by_layer=_BY_LAYER[config["norm_mode"]]),
            lead="Each cell is one head. Input layers are on top. For each score, higher means more.",
        ),
        _top_section(raw, norm, top_global, top_layers),
        _profile_section(raw, maps),
    ]
    samples = [counted(summary["samples"], "sample")] if isinstance(summary.get("samples"), int) else []
    return head_page(f"Attention heads of {model_title(summary.get('model'), config.get('model_path'))}", samples, body, raw, maps)


def _top_section(raw: HeadColumns, norm: HeadColumns, top_global: list[Any], top_layers: dict[str, Any]) -> str:
    names = [name.removesuffix("_raw") for name in raw.columns]
    numbers = {place: line for line, place in enumerate(raw.places)}
    rows: list[list[object]] = []
    for entry in top_global:
        line = numbers[entry["layer"], entry["head"]]
        scores = [value for name in names for value in (raw.columns[f"{name}_raw"][line], norm.columns[name][line])]
        rows.append([entry["rank"], entry["layer"], entry["head"], entry["combined"], *scores])
    titles = [title for name in names for title in (name, f"{name}, by layer")]
    head = ["#", "layer", "head", "combined", *titles]
    listing = table_card(head, rows, "Highest combined score", of="head", numeric=range(len(head)))
    shown = min(_LAYER_COLUMNS, max((len(entries) for entries in top_layers.values()), default=0))
    layer_rows = [
        [int(layer), *(f"{entry['head']} ({entry['combined']:.3g})" for entry in entries[:shown]), *[""] * (shown - len(entries))]
        for layer, entries in top_layers.items()
    ]
    head = ["layer", *(f"#{rank}" for rank in range(1, shown + 1))]
    caption = f"The first {'head' if shown == 1 else f'{shown} heads'} of each layer (combined score)"
    per_layer = table_card(head, layer_rows, caption, numeric=range(len(head)))
    return section("top", "Highest heads", group("grid-tables", [listing, per_layer]))


def _profile_section(raw: HeadColumns, maps: list[HeatMap]) -> str:
    cards = []
    for heat_map in maps[:-1]:
        series = [(name, _over_heads(heat_map.values, name)) for name in ("highest head", "mean", "lowest head")]
        chart = charts.line_chart(f"{heat_map.title} per layer", raw.layers, series, x_title="layer", y_title=heat_map.unit)
        cards.append(card(heat_map.title, chart))
    lead = "The scores as measured, over the layers. The normalisation by layer removes these differences between layers."
    return section("profiles", "Profiles", group("grid3", cards), lead=lead)


def _over_heads(values: Floats, name: str) -> Floats:
    known = np.ma.masked_invalid(values)
    reduced = known.max(axis=1) if name == "highest head" else known.min(axis=1) if name == "lowest head" else known.mean(axis=1)
    return np.ma.filled(reduced.astype(np.float64), np.nan)
