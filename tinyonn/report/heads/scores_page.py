"""The page of a score run: maps of the scores over layers and heads, and the heads that come first."""

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
        "How much a head writes: the L2 norm of its slice of what the output projection takes in, before the projection.",
    ),
    "ent": (
        "Concentration",
        "negative entropy, nats",
        "How concentrated the head's attention is: the negative entropy over keys; 0 is attention to one token only.",
    ),
    "task": ("Attention to the question", "share of attention", "How much of the head's attention falls on the tokens of the question."),
}
_OUT_PROJECTED = (
    "Output norm",
    "norm after the output projection",
    "How much a head puts into the layer's output: the L2 norm of what the output projection makes of its slice.",
)
_WEIGHTS = {"ent": "lambda_ent", "task": "lambda_task"}
# Keys of summary.json -> what they count, where the key alone does not tell.
_COUNTS = {
    "rows": "rows in the data",
    "samples": "rows scored",
    "unlabelled": "rows left out without an answer",
    "answered": "of these, with an answer key",
    "tokens": "tokens in all prompts",
    "truncated": "prompts cut at max length",
    "spans lost": "prompts without their whole question",
}
# What the column of scores_norm.csv is.
_BY_LAYER = {
    "zscore": "standard deviations from the layer's mean, (x − mean) / std, as in scores_norm.csv.",
    "percentile": (
        "the share of the layer's other heads that score lower, equal ones counting half, (rank − 1) / (heads − 1), as in scores_norm.csv."
    ),
}
_LAYER_COLUMNS = 8


def write_scores_page(folder: str | os.PathLike[str], *, figures_too: bool = True) -> ReportResult:
    """Draws what `tinyonn heads score` wrote: index.html, and one PNG a map.

    Args:
        folder: with scores_raw.csv, scores_norm.csv, scores_combined.csv, the two lists of top heads, summary.json and config.yaml.
        figures_too: also draw map_out.png, map_ent.png, map_task.png and map_combined.png; needs matplotlib.

    Raises:
        InputError: a file is missing or not what the command writes (the line names it), or matplotlib is missing.
    """
    root = Path(folder)
    if figures_too:
        figures.require_matplotlib()
    raw = read_heads(root / "scores_raw.csv", [f"{name}_raw" for name in SCORES], _STEP)
    scores = [name.removesuffix("_raw") for name in raw.columns]
    config = read_yaml(root / "config.yaml")
    lacking = [name for name in ("norm_mode", "out_projection", "extra_weights", *_WEIGHTS.values()) if name not in config]
    if lacking:
        raise InputError(f"{root / 'config.yaml'} must have {listed(lacking)}, got none of them; run {_STEP} again.")
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
            f"{root} must hold lists of top heads that are in scores_raw.csv, got {reason(repr(error), 80)}; run {_STEP} again."
        ) from error
    write_atomically(root / "index.html", content)
    return ReportResult(root / "index.html", tuple(drawn))


def _normalised(path: Path, scores: Sequence[str], mode: str) -> HeadColumns:
    """scores_norm.csv with the scores' own names; in folders of earlier versions columns of percentiles end in _z as well."""
    found = read_heads(path, [], _STEP)
    ending = NORM_COLUMNS[mode]
    if mode == "percentile" and all(f"{name}_z" in found.columns for name in scores):
        ending = "z"
    names = {name: f"{name}_{ending}" for name in scores}
    if any(column not in found.columns for column in names.values()):
        read_heads(path, [*names.values()], _STEP)  # which says what is missing
    return replace(found, columns={name: found.columns[column] for name, column in names.items()})


def score_maps(raw: HeadColumns, norm: HeadColumns, combined: HeadColumns, config: Mapping[str, Any]) -> list[HeatMap]:
    """One map a score: as measured, normalised by layer as the run did, and over the whole map; and their fusion as it is.

    Args:
        raw, norm, combined: the three tables, of the same heads.
        config: options of the run.
    """
    maps = []
    described = SCORES | ({"out": _OUT_PROJECTED} if config["out_projection"] else {})
    for key in (name.removesuffix("_raw") for name in raw.columns):
        title, unit, legend = described.get(key, (key, "as measured", "A score that was registered for this run."))
        heat_map = make_map(key, title, legend, unit, raw.grid(f"{key}_raw"), signed=False)
        values = norm.grid(key)
        scale = choose_scale(values, "layer", unit, signed=False)
        if config["norm_mode"] == "percentile":
            scale = Scale("sequential", False, 0.0, 1.0, False, "share of the layer's other heads below it")
        maps.append(replace(heat_map, views={**heat_map.views, "layer": (values, scale)}))
    values = combined.grid("combined")
    unit = "weighted sum of ranks"
    maps.append(
        HeatMap(
            "combined",
            "Combined score",
            _fusion(config),
            unit,
            False,
            values,
            {"none": (values, choose_scale(values, "none", unit, signed=False))},
        )
    )
    return maps


def _fusion(config: Mapping[str, Any]) -> str:
    """What the combined score is, with the run's weights."""
    weights = {name: config[option] for name, option in _WEIGHTS.items()} | config["extra_weights"]
    formula = " + ".join(["rank(out)", *(f"{weight:g}·rank({name})" for name, weight in weights.items())])
    rest = "a head's ranks within its layer, 1 for the lowest, added with the run's weights. High is a high sum, whichever score gives it."
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
            lead="Every cell is one head. Input layers are on top. For each score, higher is more.",
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
    return section("top", "Heads that come first", group("grid-tables", [listing, per_layer]))


def _profile_section(raw: HeadColumns, maps: list[HeatMap]) -> str:
    cards = []
    for heat_map in maps[:-1]:
        series = [(name, _over_heads(heat_map.values, name)) for name in ("highest head", "mean", "lowest head")]
        chart = charts.line_chart(f"{heat_map.title} per layer", raw.layers, series, x_title="layer", y_title=heat_map.unit)
        cards.append(card(heat_map.title, chart))
    lead = "The scores as measured, over the layers: what the normalisation by layer takes away."
    return section("profiles", "Profiles", group("grid3", cards), lead=lead)


def _over_heads(values: Floats, name: str) -> Floats:
    known = np.ma.masked_invalid(values)
    reduced = known.max(axis=1) if name == "highest head" else known.min(axis=1) if name == "lowest head" else known.mean(axis=1)
    return np.ma.filled(reduced.astype(np.float64), np.nan)
