"""What a report says about a scan, read from its file: totals per block, per-token losses, the configuration.

Only integrals and SEQUENCE records are read here; the planes of single tokens are read for the replay alone (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..mscan import MscanReader
from .grid import BlockGrid, Floats, build_grid
from .integrals import file_integral

# Beyond this many sequences the losses are read from an even sample: a page need not read millions of records.
LOSS_SEQUENCES = 20_000

V1_NOTES = "version_1_notes"


@dataclass(frozen=True)
class Totals:
    """Per-block numbers of a whole file, (blocks,) float64; NaN where a block was never recorded.

    Attributes:
        integral: ∫SPS, summed over tokens.
        sps: mean SPS of a token.
        activation, gradient: mean norms.
        count: tokens counted.
    """

    integral: Floats
    sps: Floats
    activation: Floats
    gradient: Floats
    count: Floats


@dataclass(frozen=True)
class LossSummary:
    """Per-token losses (nats) of the sequences that were read.

    Attributes:
        values: every finite loss.
        ordinals: (sequences read,) position in the file.
        tokens: (sequences read,) number of tokens.
        means: (sequences read,) mean loss, NaN without a labelled token.
    """

    values: Floats
    ordinals: np.ndarray
    tokens: np.ndarray
    means: Floats


@dataclass(frozen=True)
class ScanData:
    """Everything the page shows that is no single token."""

    name: str
    version: int
    metadata: Mapping[str, Any]
    grid: BlockGrid
    totals: Totals
    num_sequences: int
    losses: LossSummary
    notes: list[str] = field(default_factory=list)

    @property
    def has_gradient(self) -> bool:
        """False where every gradient norm is 0 or missing: the writer measured none."""
        return bool(np.isfinite(self.totals.gradient).any())


def collect(reader: MscanReader, name: str) -> ScanData:
    """Reads totals, losses and configuration.

    Args:
        reader: an open file.
        name: what the page calls it.

    Raises:
        InputError: the layout is empty or not contiguous.
        MscanError: the file is damaged.
    """
    grid = build_grid(reader.layout)
    totals = read_totals(reader, grid)
    losses = read_losses(reader)
    data = ScanData(
        name=name,
        version=int(reader.version),
        metadata=dict(reader.metadata),
        grid=grid,
        totals=totals,
        num_sequences=len(reader.sequences),
        losses=losses,
    )
    data.notes.extend(_notes(data))
    return data


def read_totals(reader: MscanReader, grid: BlockGrid) -> Totals:
    """Per-block totals of the whole file; NaN where no token counted."""
    total = file_integral(reader, grid)
    seen = total.count > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        sps = np.where(seen, total.sps / total.count, np.nan)
    return Totals(
        integral=np.where(seen, total.sps, np.nan),
        sps=sps,
        activation=np.where(seen, total.activation_mean, np.nan),
        # A writer that stores zeros alone measured nothing; a blank map says so, one of zeros would not.
        gradient=np.where(seen & (total.grad_mean > 0).any(), total.grad_mean, np.nan),
        count=total.count,
    )


def read_losses(reader: MscanReader) -> LossSummary:
    """Losses of all sequences, or of an even sample of LOSS_SEQUENCES."""
    total = len(reader.sequences)
    ordinals = np.arange(total) if total <= LOSS_SEQUENCES else np.linspace(0, total - 1, LOSS_SEQUENCES).astype(np.int64)
    values: list[Floats] = []
    tokens = np.zeros(len(ordinals), dtype=np.int64)
    means = np.full(len(ordinals), np.nan)
    for row, ordinal in enumerate(ordinals):
        sequence = reader.sequences[int(ordinal)]
        tokens[row] = sequence.num_tokens
        loss = np.asarray(sequence.loss, dtype=np.float64)
        finite = loss[np.isfinite(loss)]
        if len(finite):
            means[row] = finite.mean()
            values.append(finite)
    return LossSummary(np.concatenate(values) if values else np.empty(0), ordinals, tokens, means)


def _notes(data: ScanData) -> list[str]:
    notes = []
    if not data.has_gradient and data.num_sequences:
        notes.append(
            "Every gradient norm in this file is 0 or missing. That is no measurement: its writer stored none. "
            "SPS then holds the activation term alone."
        )
    if data.num_sequences == 0:
        notes.append("The file holds no complete sequence.")
    elif not len(data.losses.values):
        notes.append("No token of this file carries a loss.")
    if data.num_sequences > len(data.losses.ordinals):
        notes.append(f"Losses are those of {len(data.losses.ordinals):,} sequences, evenly spaced among {data.num_sequences:,}.")
    # What the reader of version 1 found out about the file's writer.
    notes.extend(str(line) for line in data.metadata.get(V1_NOTES, ()) if isinstance(data.metadata[V1_NOTES], list))
    never = int((data.totals.count == 0).sum())
    if never and data.num_sequences:
        notes.append(f"{never:,} of {data.grid.num_blocks:,} blocks were never recorded (experts without a token); they are left blank.")
    return notes
