"""Section of the page that replays one text at a time, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..html.page import section, text
from .data import ScanData, loss_is_broken
from .grid import short_names
from .replay import MAX_TOKENS, ReplayOrder, ReplaySequence, pack_int16


def replay_section(data: ScanData, sequences: Sequence[ReplaySequence], order: ReplayOrder) -> tuple[str, dict[str, Any]]:
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
        "sequences": [_replay_payload(sequence, loss_is_broken(sequence.loss, data.metadata)) for sequence in sequences],
    }
    means = dict(zip(data.losses.ordinals.tolist(), data.losses.means.tolist(), strict=True))
    broken = dict(zip(data.losses.ordinals.tolist(), data.losses.broken.tolist(), strict=True))
    options = "".join(
        f'<option value="{number}">{sequence.ordinal}: {text(sequence.sequence_id[:60])} ({len(sequence.token_ids)} tokens, '
        f"{_mean_loss(means[sequence.ordinal], broken[sequence.ordinal])})</option>"
        for number, sequence in enumerate(sequences)
    )
    layers = "".join(
        f'<option value="{row}">{"layer " if name.isdigit() else ""}{text(name)}</option>' for row, name in enumerate(grid.layers)
    )
    modules = "".join(f'<option value="{column}">{text(name)}</option>' for column, name in enumerate(short))
    chosen = {"surprising": "those with the highest mean loss", "first": "the first ones"}[order]
    which = (
        f"{len(sequences)} of {data.num_sequences:,} sequences are shown: {chosen}."
        if len(sequences) < data.num_sequences
        else "All sequences are shown."
    )
    missing = (
        ""
        if sequences[0].pieces is not None
        else " The scan's tokenizer was not found, so tokens are shown as ids. To show text, pass the tokenizer when you write the report."
    )
    lead = (
        f"{which} A token's surprisal is the loss of predicting it from the tokens before it. The SPS at a token is that of predicting the "
        f"next token from it.{missing}"
    )
    body = f"""<div id="replay"><div class="controls">
<label>Sequence <select data-replay="sequence">{options}</select></label>
<label>Colour by <select data-replay="colour"><option value="loss">surprisal</option><option value="sps">SPS</option></select></label>
<label>of <select data-replay="layer" aria-label="layer">{layers}</select></label>
<select data-replay="module" aria-label="module"><option value="spread">spread over all blocks</option>{modules}</select></div>
<div class="controls"><button data-replay="back" aria-label="previous token">◀</button><button data-replay="play">Play</button>
<button data-replay="next" aria-label="next token">▶</button>
<input type="range" data-replay="slider" min="0" max="0" value="0" aria-label="token"></div>
<div class="replay"><div class="card">
<div class="tokens" data-replay="tokens" tabindex="0" role="group" aria-label="text; arrow keys step, space plays"></div>
<div class="replay-bar"><span data-replay="low"></span><span data-replay="bar" class="ramp"></span><span data-replay="high"></span></div>
<p class="legend" data-replay="cut"></p><p class="stored" data-replay="stored"></p></div>
<div class="card"><dl class="token-facts" data-replay="facts" aria-live="polite"></dl><div data-replay="map"></div></div></div></div>"""
    return section("replay-section", "Replay", body, lead=lead), payload


def _mean_loss(mean: float, broken: bool) -> str:
    if np.isfinite(mean):
        return f"mean loss {mean:.2f}"
    return "loss not finite" if broken else "no loss"


def _replay_payload(sequence: ReplaySequence, broken: bool) -> dict[str, Any]:
    packed, scale = pack_int16(sequence.cells) if sequence.cells is not None else (None, 1.0)
    note = []
    if sequence.cut:
        note.append(f"Cut after {MAX_TOKENS:,} tokens; {sequence.cut:,} more are in the file.")
    if sequence.cells is None:
        note.append("This sequence has no SPS per token: the file holds none, or the page would become too large.")
    if sequence.marked is not None:
        note.append("Underlined tokens are the marked ones (the answer).")
    return {
        "ids": sequence.token_ids,
        "pieces": sequence.pieces,
        "text": sequence.text if sequence.pieces is None else None,
        "loss": sequence.loss,
        "broken": broken,
        "marked": None if sequence.marked is None else [int(mark) for mark in sequence.marked],
        "packed": packed,
        # Full precision, because a rounded scale would shift every value.
        "scale": repr(scale),
        "note": " ".join(note),
    }
