"""Page of a report: its sections in reading order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._io.units import counted
from ...mscan.layout import layer_count
from ..html import charts
from ..html.maps import LEGENDS, HeatMap, Normalisation, make_map
from ..html.page import (
    card,
    facts,
    group,
    map_card,
    maps_data,
    maps_section,
    notices,
    page,
    section,
    short_digest,
    table_card,
    terms,
    text,
    view_controls,
)
from ..html.palette import DASHES
from .data import V1_NOTES, ScanData
from .grid import OUTSIDE, PLACE_COLUMNS, Floats, outside_terms, short_names
from .heads import HeadScores, head_names
from .replay import ReplayOrder, ReplaySequence
from .replay_page import replay_section


def report_page(
    data: ScanData,
    maps: Sequence[HeatMap],
    heads: HeadScores | str,
    sequences: Sequence[ReplaySequence],
    normalise: Normalisation,
    top: int,
    order: ReplayOrder,
    dropped: Sequence[str],
) -> str:
    """The whole document.

    Args:
        data: totals, losses and configuration.
        maps: the four maps of `scan_maps`.
        heads: scores per head, or the reason why they are missing.
        sequences: sequences of the replay; without any, the page has no replay.
        normalise: normalisation that the maps show first.
        top: number of listed blocks and heads.
        order: order by which the sequences were chosen.
        dropped: lines on what the reader dropped of a damaged file.
    """
    grid = data.grid
    head_body, head_maps = _heads_section(data, heads, top)
    elements: dict[str, object] = {"maps-data": maps_data(maps, grid.layers, grid.modules, short_names(grid.modules)) + head_maps}
    maps_lead = "Each cell is one module of one layer: the mean over its blocks of 64 features (and over experts). Input layers are on top."
    body = [
        notices([*data.notes, *(f"The file is damaged: {line}" for line in dropped)]),
        section("configuration", "Run configuration", facts(configuration(data))),
        maps_section(
            "Layers and modules",
            maps,
            controls=view_controls(normalise, "stored units. SPS and ∫SPS keep their zero. Cells without such a module show a dash."),
            below=terms(outside_terms(grid)),
            lead=maps_lead,
        ),
        _profiles_section(data, maps),
        _blocks_section(data, top),
        head_body,
    ]
    if sequences:
        replay_body, elements["replay-data"] = replay_section(data, sequences, order)
        body.append(replay_body)
    body.append(_losses_section(data))
    tokens = f"{counted(int(data.losses.tokens.sum()), 'token')}, " if len(data.losses.ordinals) == data.num_sequences else ""
    blocks = f"{counted(grid.num_blocks, 'block')} of {counted(len(grid.layout), 'weight')}"
    subtitle = f"{counted(data.num_sequences, 'sequence')}, {tokens}{blocks}."
    return page(f"Scan of {scan_title(data)}", subtitle, body, elements, "replay.js")


def scan_title(data: ScanData) -> str:
    """Model and topic, for titles."""
    model, topic = data.metadata.get("model") or data.metadata.get("model_name"), data.metadata.get("topic")
    return " on ".join(str(part) for part in (model or data.name, topic) if part)


def configuration(data: ScanData) -> dict[str, object]:
    """Configuration of the run: the extent of the measurement, then every key of the metadata."""
    first: dict[str, object] = {
        "file": f"{data.name} (.mscan v{data.version})",
        "sequences": data.num_sequences,
        "tokens measured": int(data.totals.count.max(initial=0)),
        "layers": layer_count(data.grid.groups),
        "weights": len(data.grid.layout),
        "blocks per token": data.grid.num_blocks,
    }
    shown = {key: _short(value) for key, value in data.metadata.items() if key not in ("sequences", V1_NOTES)}
    return first | shown


def _short(value: object) -> object:
    """A value of the metadata in one line: the first digits of a digest, the size of a long collection."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return short_digest(value) or (value if len(value) <= 120 else f"{value[:120]}…")
    if isinstance(value, (list, dict)):
        dumped = json.dumps(value, ensure_ascii=False)
        return dumped if len(dumped) <= 60 else f"{len(value):,} entries"
    return value


def profile_series(data: ScanData, values: Floats) -> list[tuple[str, Floats]]:
    """(layers, modules) as one series per module; if they outnumber the colours, the modules with most blocks."""
    short = short_names(data.grid.modules)
    blocks = np.bincount(data.grid.cell % data.grid.shape[1], minlength=data.grid.shape[1])
    spans = [column for column in range(data.grid.shape[1]) if np.isfinite(values[:, column]).any()]
    inside = [column for column in spans if data.grid.modules[column] != OUTSIDE] or spans
    kept = sorted(sorted(inside, key=lambda column: -blocks[column])[: len(DASHES)])
    return [(short[column], values[:, column]) for column in kept]


def _profiles_section(data: ScanData, maps: Sequence[HeatMap]) -> str:
    cards = []
    for heat_map in maps[:3]:
        chart = charts.line_chart(
            f"{heat_map.title} per layer",
            data.grid.layers,
            profile_series(data, heat_map.values),
            x_title="layer",
            y_title=heat_map.unit,
            log=not heat_map.signed,
            zero=heat_map.signed,
        )
        cards.append(card(heat_map.title, chart))
    more = data.grid.shape[1] > len(DASHES) + 1
    lead = "The same numbers over the layers." + (f" The {len(DASHES)} modules with the most blocks are drawn." if more else "")
    return section("profiles", "Profiles", group("grid3", cards), lead=lead)


def _blocks_section(data: ScanData, top: int) -> str:
    totals = data.totals
    known = np.flatnonzero(np.isfinite(totals.integral))
    ranked = known[np.argsort(-totals.integral[known], kind="stable")]
    head = ["#", *PLACE_COLUMNS, "∫SPS", "SPS per token", "activation", "gradient", "tokens"]
    cards = []
    for title, order in (("Highest ∫SPS", ranked[:top]), ("Lowest ∫SPS", ranked[::-1][:top])):
        rows = []
        for rank, block in enumerate(order.tolist(), start=1):
            numbers = [plane[block] for plane in (totals.integral, totals.sps, totals.activation, totals.gradient)]
            rows.append([rank, *data.grid.block_place(block).cells, *numbers, int(totals.count[block])])
        cards.append(table_card(head, rows, title, of="block", numeric=(0, 4, 5, 6, 7, 8)))
    lead = "High ∫SPS: high activation, small gradient. Low: large gradient, low activation. Features are counted from 0 within the weight."
    return section("blocks", "Top blocks", group("grid-tables", cards), lead=lead)


def _heads_section(data: ScanData, heads: HeadScores | str, top: int) -> tuple[str, list[dict[str, Any]]]:
    if isinstance(heads, str):
        return section("heads", "Attention heads", f"<p>{text(heads)}</p>"), []
    layers = [data.grid.layers[row] for row in heads.layers]
    total = heads.total
    order = np.argsort(-total, axis=None, kind="stable")[:top]
    order = order[np.isfinite(total.flat[order])]
    rows = []
    for rank, flat in enumerate(order, start=1):
        row, head = divmod(int(flat), total.shape[1])
        rows.append([rank, layers[row], head, total[row, head], heads.query[row, head], heads.key[row, head], heads.value[row, head]])
    head_columns = ["#", "layer", "head", "∫SPS", "query", "key", "value"]
    listing = table_card(head_columns, rows, "Highest ∫SPS", of="head", numeric=(0, 2, 3, 4, 5, 6))
    heat_map = make_map("heads", "∫SPS of attention heads", LEGENDS["integral"], "standard deviations, summed", total, signed=True)
    whole = "one block is one head" if heads.blocks_per_head == 1 else f"a head is {heads.blocks_per_head:g} blocks, divided by features"
    lead = (
        f"∫SPS of a head's q features plus its share of the k and v features of its group; {whole}. "
        "o_proj is not included: its heads are input columns, and a scan records output blocks."
    )
    body = group("grid2", [map_card(heat_map), listing])
    return section("heads", "Attention heads", body, lead=lead), maps_data([heat_map], layers, *head_names(total.shape[1]))


def _losses_section(data: ScanData) -> str:
    values = data.losses.values
    means = data.losses.means[np.isfinite(data.losses.means)]
    marks = [("mean", float(values.mean())), ("median", float(np.median(values)))] if len(values) else []
    tokens = charts.histogram("Loss of single tokens", values, x_title="loss of a token, nats", y_title="tokens", marks=marks)
    middle = [("median", float(np.median(means)))] if len(means) else []
    sequences = charts.histogram(
        "Mean loss of sequences", means, x_title="mean loss of a sequence, nats", y_title="sequences", marks=middle, bins=30
    )
    lead = ""
    if len(values):
        mean = float(values.mean())
        lead = f"Mean {mean:.4g} nats a token over {len(values):,} tokens: perplexity {np.exp(min(mean, 700)):.4g}."
    return section("losses", "Loss", group("grid3", [card("Tokens", tokens), card("Sequences", sequences)]), lead=lead)
