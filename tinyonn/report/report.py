"""The report of one scan: what each layer and module did, which blocks and heads stand out, and the text token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn.errors import InputError
from tinyonn.mscan import MscanReader
from tinyonn.report import charts, figures
from tinyonn.report.data import ScanData, collect
from tinyonn.report.grid import Floats, short_names
from tinyonn.report.heads import HeadScores, head_scores
from tinyonn.report.maps import LEGENDS, NORMALISATIONS, HeatMap, Normalisation, make_map, scan_maps
from tinyonn.report.page import facts, map_data, notices, page, section, table, text, write_atomically
from tinyonn.report.palette import DASHES
from tinyonn.report.replay import MAX_TOKENS, REPLAY_ORDERS, ReplayOrder, ReplaySequence, choose_sequences, pack_int16, read_replay
from tinyonn.report.token_text import find_tokenizer


@dataclass(frozen=True)
class ReportResult:
    """Where a report lies: the page and the PNGs beside it."""

    html: Path
    pngs: tuple[Path, ...]


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    normalise: Normalisation = "layer",
    top: int = 20,
    replay: int = 8,
    replay_order: ReplayOrder = "surprising",
    tokenizer: str | os.PathLike[str] | None = None,
    figures_too: bool = True,
) -> ReportResult:
    """Writes one self-contained HTML page about a scan, and PNGs of its maps beside it.

    Args:
        path: a `.mscan` file, or one of a set of ranks.
        output: the page; PNGs take its name with `-maps.png` and `-profiles.png`.
        normalise: what the maps show first, and the PNGs: "layer", "global" or "none" (`tinyonn.report.maps`).
        top: blocks and heads listed.
        replay: sequences that can be read token by token; 0 for none.
        replay_order: those of the highest mean loss, or the first.
        tokenizer: folder of the model, or its tokenizer.json, to show tokens as text; None looks for the scan's own on this
            machine, and shows token ids where it is not.
        figures_too: also draw the PNGs; needs matplotlib.

    Returns:
        The files written.

    Raises:
        InputError: a bad option, an output that cannot be written, matplotlib missing, or a layout that cannot be shown.
        MscanError: the file is damaged.
    """
    if normalise not in NORMALISATIONS:
        raise InputError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}.")
    if replay_order not in REPLAY_ORDERS:
        raise InputError(f"replay_order must be one of {', '.join(REPLAY_ORDERS)}, got {replay_order!r}.")
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}.")
    if replay < 0:
        raise InputError(f"replay must be at least 0, got {replay}.")
    target = check_output(output)
    if figures_too:
        figures.require_matplotlib()
    name = Path(path).name
    with MscanReader(path) as reader:
        data = collect(reader, name)
        decoder = find_tokenizer(data.metadata, tokenizer)
        sequences = read_replay(reader, data.grid, choose_sequences(data.losses, replay, replay_order), decoder)
        dropped = [str(reader.report)] if reader.report else []
    maps = scan_maps(data)
    heads = head_scores(data.grid, data.totals, data.metadata)
    write_atomically(target, _document(data, maps, heads, sequences, normalise, top, replay_order, dropped))
    drawn = _draw(target, data, maps, normalise) if figures_too else ()
    return ReportResult(target, drawn)


def check_output(output: str | os.PathLike[str]) -> Path:
    """The page's path, checked before any work.

    Raises:
        InputError: it does not end in .html, is a folder, or lies in a folder that is not there.
    """
    target = Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"output must end in .html, got {os.fspath(output)}.")
    if target.is_dir():
        raise InputError(f"output must be a file, got the folder {os.fspath(output)}.")
    if not target.parent.is_dir():
        raise InputError(f"output must be in a folder that exists, got {os.fspath(output)}.")
    return target


def scan_title(data: ScanData) -> str:
    """Model and topic in words."""
    model, topic = data.metadata.get("model"), data.metadata.get("topic")
    return " on ".join(str(part) for part in (model or data.name, topic) if part)


def configuration(data: ScanData) -> dict[str, object]:
    """The run's configuration as a reader wants it: what was measured first, then every key of the metadata."""
    first: dict[str, object] = {
        "file": f"{data.name} (.mscan v{data.version})",
        "sequences": data.num_sequences,
        "tokens measured": int(data.totals.count.max(initial=0)),
        "layers": len(data.grid.layers),
        "weights": len(data.grid.layout),
        "blocks a token": data.grid.num_blocks,
    }
    return first | {key: _short(value) for key, value in data.metadata.items() if key != "sequences"}


def _short(value: object) -> object:
    if isinstance(value, (str, int, float, bool)) or value is None:
        shown = value if not isinstance(value, bool) else ("yes" if value else "no")
        return f"{shown[:12]}…" if isinstance(shown, str) and len(shown) == 64 and set(shown) <= set("0123456789abcdef") else shown
    dumped = json.dumps(value, ensure_ascii=False, default=str)
    return dumped if len(dumped) <= 300 else f"{dumped[:300]}…"


def profile_series(data: ScanData, values: Floats) -> list[tuple[str, Floats]]:
    """(layers, modules) as one line per module; the modules with most blocks where there are more than the page has colours."""
    short = short_names(data.grid.modules)
    blocks = np.bincount(data.grid.cell % data.grid.shape[1], minlength=data.grid.shape[1])
    spans = [column for column in range(data.grid.shape[1]) if np.isfinite(values[:, column]).any()]
    inside = [column for column in spans if data.grid.modules[column] != "outside layers"] or spans
    kept = sorted(sorted(inside, key=lambda column: -blocks[column])[: len(DASHES)])
    return [(short[column], values[:, column]) for column in kept]


def _document(
    data: ScanData,
    maps: Sequence[HeatMap],
    heads: HeadScores | str,
    sequences: Sequence[ReplaySequence],
    normalise: Normalisation,
    top: int,
    order: ReplayOrder,
    dropped: Sequence[str],
) -> str:
    grid = data.grid
    short = short_names(grid.modules)
    elements: dict[str, object] = {"maps-data": [map_data(heat_map, grid.layers, grid.modules, short) for heat_map in maps]}
    body = [notices([*data.notes, *(f"Recovered file: {line}" for line in dropped)])]
    body.append(section("configuration", "Run configuration", facts(configuration(data))))
    body.append(_maps_section(data, maps, normalise))
    body.append(_profiles_section(data, maps))
    body.append(_blocks_section(data, top))
    head_body, head_map = _heads_section(data, heads, top)
    body.append(head_body)
    if head_map is not None:
        elements["maps-data"] = [*elements["maps-data"], head_map]  # type: ignore[misc]
    if sequences:
        replay_body, elements["replay-data"] = _replay_section(data, sequences, order)
        body.append(replay_body)
    body.append(_losses_section(data))
    tokens = int(data.losses.tokens.sum())
    subtitle = f"{data.num_sequences:,} sequences, {tokens:,} tokens, {grid.num_blocks:,} blocks in {len(grid.layers)} rows of weights. Written by tinyonn."
    return page(f"Scan of {scan_title(data)}", subtitle, "\n".join(body), elements, ["core.js", "map.js", "replay.js"])


def normalise_controls(chosen: Normalisation) -> str:
    """The radio buttons that switch every map."""
    labels = {"layer": "by layer", "global": "global", "none": "as measured"}
    buttons = "".join(
        f'<label><input type="radio" name="normalise" value="{how}"{" checked" if how == chosen else ""}> {labels[how]}</label>' for how in NORMALISATIONS
    )
    return (
        f'<div class="controls"><fieldset><legend>Normalisation</legend>{buttons}</fieldset></div>'
        '<p class="legend"><b>By layer</b>: each row is scaled by itself, so every layer shows its pattern. <b>Global</b>: all rows share one '
        "scale, so layers compare. <b>As measured</b>: stored units. SPS and ∫SPS keep their zero. Cells without such a module show a dash.</p>"
    )


def _maps_section(data: ScanData, maps: Sequence[HeatMap], normalise: Normalisation) -> str:
    cards = "".join(
        f'<div class="card"><h3>{text(heat_map.title)}</h3><p class="legend">{text(heat_map.legend)}</p><figure data-map="{heat_map.key}"></figure></div>'
        for heat_map in maps
    )
    lead = "Every cell is one module of one layer, the mean over its blocks of 64 features (experts of a layer together), input layers on top."
    return section("maps", "Layers and modules", normalise_controls(normalise) + f'<div class="grid2">{cards}</div>', lead=lead)


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
        cards.append(f'<figure class="card"><h3>{text(heat_map.title)}</h3>{chart}</figure>')
    more = data.grid.shape[1] > len(DASHES) + 1
    lead = "The same numbers as lines over the layers." + (f" The {len(DASHES)} modules with most blocks are drawn." if more else "")
    return section("profiles", "Profiles", f'<div class="grid3">{"".join(cards)}</div>', lead=lead)


def block_rows(data: ScanData, order: np.ndarray) -> list[list[object]]:
    """Table rows of blocks."""
    rows: list[list[object]] = []
    for rank, block in enumerate(order, start=1):
        place, totals = data.grid.block_place(int(block)), data.totals
        features = f"{place.first}–{place.last}"
        numbers = [totals.integral[block], totals.sps[block], totals.activation[block], totals.gradient[block]]
        rows.append([rank, place.layer, place.module, features, *numbers, int(totals.count[block])])
    return rows


def _blocks_section(data: ScanData, top: int) -> str:
    known = np.flatnonzero(np.isfinite(data.totals.integral))
    ranked = known[np.argsort(-data.totals.integral[known], kind="stable")]
    head = ["#", "layer", "module", "features", "∫SPS", "SPS a token", "activation", "gradient", "tokens"]
    numeric = (0, 4, 5, 6, 7, 8)
    cards = [("Highest ∫SPS", ranked[:top]), ("Lowest ∫SPS", ranked[::-1][:top])]
    body = "".join(
        f'<div class="card">{table(head, block_rows(data, order), caption=f"{title}, {len(order)} blocks", numeric=numeric)}</div>' for title, order in cards
    )
    lead = "High: active where the loss pulls little. Low: pulled on more than active. Features count from 0 within the weight."
    return section("blocks", "Top blocks", f'<div class="grid2">{body}</div>', lead=lead)


def _heads_section(data: ScanData, heads: HeadScores | str, top: int) -> tuple[str, dict[str, Any] | None]:
    if isinstance(heads, str):
        return section("heads", "Attention heads", f"<p>{text(heads)}</p>"), None
    layers = [data.grid.layers[row] for row in heads.layers]
    total = heads.total
    order = np.argsort(-total, axis=None, kind="stable")[:top]
    order = order[np.isfinite(total.flat[order])]
    rows = []
    for rank, flat in enumerate(order, start=1):
        row, head = divmod(int(flat), total.shape[1])
        rows.append([rank, layers[row], head, total[row, head], heads.query[row, head], heads.key[row, head], heads.value[row, head]])
    listing = table(["#", "layer", "head", "∫SPS", "query", "key", "value"], rows, caption=f"Highest ∫SPS, {len(rows)} heads", numeric=(0, 2, 3, 4, 5, 6))
    names = [str(head) for head in range(total.shape[1])]
    heat_map = make_map("heads", "∫SPS of attention heads", LEGENDS["integral"], "standard deviations, summed", total, signed=True)
    whole = "one block is one head" if heads.blocks_per_head == 1 else f"a head is {heads.blocks_per_head:g} blocks, shared out by features"
    lead = (
        f"The q block of a head, plus its share of the k and v that it uses together with its group; {whole}. "
        "o_proj is not counted: its heads are input columns, and a scan records output blocks."
    )
    body = (
        f'<div class="grid2"><div class="card"><h3>{text(heat_map.title)}</h3><figure data-map="heads"></figure></div><div class="card">{listing}</div></div>'
    )
    return section("heads", "Attention heads", body, lead=lead), map_data(heat_map, layers, [f"head {name}" for name in names], names)


def _replay_section(data: ScanData, sequences: Sequence[ReplaySequence], order: ReplayOrder) -> tuple[str, dict[str, Any]]:
    grid = data.grid
    short = short_names(grid.modules)
    cells = np.unique(grid.cell)
    finite = data.losses.values
    payload: dict[str, Any] = {
        "rows": list(grid.layers),
        "columns": list(grid.modules),
        "short": short,
        "cells": [[int(cell) // grid.shape[1], int(cell) % grid.shape[1]] for cell in cells],
        "lossHigh": float(np.quantile(finite, 0.98)) if len(finite) and finite.max() > 0 else 1.0,
        "sequences": [_replay_payload(sequence) for sequence in sequences],
    }
    means = dict(zip(data.losses.ordinals.tolist(), data.losses.means.tolist(), strict=True))
    options = "".join(
        f'<option value="{number}">{sequence.ordinal}: {text(sequence.sequence_id[:60])} ({len(sequence.token_ids)} tokens, '
        f"{'no loss' if not np.isfinite(means[sequence.ordinal]) else f'mean loss {means[sequence.ordinal]:.2f}'})</option>"
        for number, sequence in enumerate(sequences)
    )
    layers = "".join(f'<option value="{row}">{"layer " if name.isdigit() else ""}{text(name)}</option>' for row, name in enumerate(grid.layers))
    modules = "".join(f'<option value="{column}">{text(name)}</option>' for column, name in enumerate(short))
    chosen = {"surprising": "those with the highest mean loss", "first": "the first ones"}[order]
    which = f"{len(sequences)} of {data.num_sequences:,} sequences are here: {chosen}." if len(sequences) < data.num_sequences else "Every sequence is here."
    missing = "" if sequences[0].pieces is not None else " No tokenizer of this scan was found here, so tokens are shown as ids; name one when writing the report."
    lead = (
        f"{which} A token's surprisal is the loss of predicting it from the tokens before; the SPS at a token is what the model did while "
        f"reading it, to predict the next.{missing}"
    )
    body = f"""<div id="replay"><div class="controls">
<label>Sequence <select data-replay="sequence">{options}</select></label>
<label>Colour by <select data-replay="colour"><option value="loss">surprisal</option><option value="sps">SPS</option></select></label>
<label>of <select data-replay="layer" aria-label="layer">{layers}</select></label>
<select data-replay="module" aria-label="module"><option value="spread">spread over all blocks</option>{modules}</select></div>
<div class="controls"><button data-replay="back" aria-label="previous token">◀</button><button data-replay="play">Play</button>
<button data-replay="next" aria-label="next token">▶</button><input type="range" data-replay="slider" min="0" max="0" value="0" aria-label="token"></div>
<div class="replay"><div class="card"><div class="tokens" data-replay="tokens" tabindex="0" role="group" aria-label="text; arrow keys step, space plays"></div>
<div class="replay-bar"><span data-replay="low"></span><span data-replay="bar" class="ramp"></span><span data-replay="high"></span></div>
<p class="legend" data-replay="cut"></p><p class="stored" data-replay="stored"></p></div>
<div class="card"><dl class="token-facts" data-replay="facts" aria-live="polite"></dl><div data-replay="map"></div></div></div></div>"""
    return section("replay-section", "Replay", body, lead=lead), payload


def _replay_payload(sequence: ReplaySequence) -> dict[str, Any]:
    packed, scale = pack_int16(sequence.cells) if sequence.cells is not None else (None, 1.0)
    note = []
    if sequence.cut:
        note.append(f"Cut after {MAX_TOKENS:,} tokens; {sequence.cut:,} more are in the file.")
    if sequence.cells is None:
        note.append("No SPS per token here: the file holds none for this sequence, or the page would have become too heavy.")
    if sequence.marked is not None:
        note.append("Underlined tokens are the marked ones (the answer).")
    return {
        "ids": sequence.token_ids,
        "pieces": sequence.pieces,
        "text": sequence.text if sequence.pieces is None else None,
        "loss": sequence.loss,
        "marked": None if sequence.marked is None else [int(mark) for mark in sequence.marked],
        "packed": packed,
        # Full precision: rounding the scale would shift every value.
        "scale": repr(scale),
        "note": " ".join(note),
    }


def _losses_section(data: ScanData) -> str:
    values = data.losses.values
    means = data.losses.means[np.isfinite(data.losses.means)]
    marks = [("mean", float(values.mean())), ("median", float(np.median(values)))] if len(values) else []
    tokens = charts.histogram("Loss of single tokens", values, x_title="loss of a token, nats", y_title="tokens", marks=marks)
    middle = [("median", float(np.median(means)))] if len(means) else []
    sequences = charts.histogram("Mean loss of sequences", means, x_title="mean loss of a sequence, nats", y_title="sequences", marks=middle, bins=30)
    lead = f"Mean {values.mean():.4g} nats a token over {len(values):,} tokens: perplexity {np.exp(min(values.mean(), 700)):.4g}." if len(values) else ""
    cards = f'<figure class="card"><h3>Tokens</h3>{tokens}</figure><figure class="card"><h3>Sequences</h3>{sequences}</figure>'
    return section("losses", "Loss", f'<div class="grid2">{cards}</div>', lead=lead)


def _draw(target: Path, data: ScanData, maps: Sequence[HeatMap], normalise: Normalisation) -> tuple[Path, ...]:
    title = scan_title(data)
    short = short_names(data.grid.modules)
    first, second = target.with_name(f"{target.stem}-maps.png"), target.with_name(f"{target.stem}-profiles.png")
    figures.draw_maps(first, title, maps, normalise, data.grid.layers, short)
    panels = [(f"{heat_map.title} ({heat_map.unit})", profile_series(data, heat_map.values), not heat_map.signed) for heat_map in maps[:3]]
    figures.draw_profiles(second, title, panels, data.grid.layers)
    return first, second
