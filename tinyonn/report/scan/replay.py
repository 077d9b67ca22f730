"""Sequences for the replay: text, losses and SPS per layer and module, token by token.

    cell(token, layer, module) = mean SPS of the module's blocks
    spread(token, layer)       = root mean square of the layer's SPS (their mean is 0 by definition)

Values are stored as int16 with one scale per sequence; the error is at most 1/65,000 of the largest.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ...mscan import MscanReader
from .data import LossSummary
from .grid import BlockGrid, Floats
from .integrals import token_sps
from .token_text import Decoder, token_pieces

ReplayOrder = Literal["surprising", "first"]
REPLAY_ORDERS: tuple[ReplayOrder, ...] = get_args(ReplayOrder)

# A longer text is cut, because the page has one element per token.
MAX_TOKENS = 2048
# Beyond this many per-token values (5 bytes for two) further sequences have only text and loss.
MAX_VALUES = 2_000_000

_MISSING = -32768
_LARGEST = 32767


@dataclass(frozen=True)
class ReplaySequence:
    """One sequence for the replay.

    Attributes:
        ordinal, sequence_id: its position and name in the file.
        pieces: text of each token, or None without a tokenizer.
        text: the stored text, or None.
        token_ids: (tokens,).
        loss: (tokens,) loss of predicting the next token, NaN without a label.
        marked: (tokens,) marked tokens (answers), or None if all are marked.
        cells: (tokens, columns) SPS of each existing (layer, module), then the spread of each layer; None without planes.
        cut: number of tokens left out at the end.
    """

    ordinal: int
    sequence_id: str
    pieces: list[str] | None
    text: str | None
    token_ids: list[int]
    loss: Floats
    marked: npt.NDArray[np.bool_] | None
    cells: Floats | None
    cut: int


def choose_sequences(losses: LossSummary, limit: int, order: ReplayOrder) -> list[int]:
    """Ordinals for the replay: the first sequences, or those with the highest mean loss (with at least 8 tokens, if enough exist)."""
    if order == "first":
        return [int(ordinal) for ordinal in losses.ordinals[:limit]]
    # A sequence of two rare tokens would always come first, so short sequences come last.
    mean = np.where(np.isfinite(losses.means), losses.means, -np.inf)
    ranked = np.lexsort((losses.ordinals, -mean, losses.tokens < 8))
    return [int(losses.ordinals[row]) for row in ranked[:limit]]


def read_replay(reader: MscanReader, grid: BlockGrid, ordinals: Sequence[int], decoder: Decoder | None) -> list[ReplaySequence]:
    """Reads the chosen sequences within the limits of MAX_TOKENS and MAX_VALUES."""
    chosen = []
    left = MAX_VALUES
    columns = len(np.unique(grid.cell)) + grid.shape[0]
    for ordinal in ordinals:
        sequence = reader.sequences[ordinal]
        count = min(int(sequence.num_tokens), MAX_TOKENS)
        cells = None
        if sequence.has_records and count * columns <= left:
            activation, gradient = reader.planes(ordinal)
            cells = token_cells(grid, activation[:count], gradient[:count])
            left -= cells.size
        ids = [int(token) for token in np.asarray(sequence.token_ids)[:count]]
        mask = None if sequence.mask is None else np.asarray(sequence.mask)[:count].astype(bool)
        chosen.append(
            ReplaySequence(
                ordinal=ordinal,
                sequence_id=str(sequence.sequence_id),
                pieces=token_pieces(decoder, ids) if decoder is not None else None,
                text=sequence.text,
                token_ids=ids,
                loss=np.asarray(sequence.loss, dtype=np.float64)[:count],
                marked=mask if mask is not None and not mask.all() else None,
                cells=cells,
                cut=int(sequence.num_tokens) - count,
            )
        )
    return chosen


def token_cells(grid: BlockGrid, activation: npt.NDArray[np.float32], gradient: npt.NDArray[np.float32]) -> Floats:
    """SPS per token: existing cells in grid order, then the spread of each layer. Two planes of (tokens, blocks) to (tokens, columns)."""
    sps = token_sps(activation, gradient, grid.layer_offsets)
    cells = grid.token_means(sps)[:, np.unique(grid.cell)]
    spread = np.full((len(sps), grid.shape[0]), np.nan)
    for row, (first, last) in enumerate(zip(grid.layer_offsets[:-1], grid.layer_offsets[1:], strict=True)):
        layer = sps[:, first:last]
        present = np.isfinite(layer)
        known = present.any(axis=1)
        square = np.where(present, layer, 0.0) ** 2
        spread[known, row] = np.sqrt(square.sum(axis=1)[known] / present.sum(axis=1)[known])
    return np.concatenate([cells, spread], axis=1)


def pack_int16(values: Floats) -> tuple[str, float]:
    """Base64 of little-endian int16, and the scale that restores them; NaN is −32768."""
    finite = np.isfinite(values)
    largest = float(np.abs(values[finite]).max(initial=0.0))
    scale = largest / _LARGEST if largest > 0 else 1.0
    codes = np.full(values.shape, _MISSING, dtype="<i2")
    codes[finite] = np.rint(values[finite] / scale).astype("<i2")
    return base64.b64encode(codes.tobytes()).decode("ascii"), scale
