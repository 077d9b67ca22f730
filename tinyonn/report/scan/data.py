"""Data of a report, read from a scan: totals per block, losses per token, configuration.

This module reads integrals and SEQUENCE records only. `replay.py` reads the planes of single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..._io.units import not_finite_cause
from ...mscan import MscanReader
from ...mscan.not_measured import describe, without_value
from .grid import BlockGrid, Floats, build_grid, even_sample
from .integrals import file_integral

# Beyond this many sequences the losses are read from an even sample, not from millions of records.
LOSS_SEQUENCES = 20_000

V1_NOTES = "version_1_notes"


@dataclass(frozen=True)
class Totals:
    """Per-block numbers of a whole file, (blocks,) float64; NaN for a block without records.

    Attributes:
        integral: ∫SPS, summed over tokens.
        sps: mean SPS per token.
        activation, gradient: mean norms.
        count: number of counted tokens.
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
        values: all finite losses.
        ordinals: (sequences read,) position in the file.
        tokens: (sequences read,) number of tokens.
        means: (sequences read,) mean loss, NaN without a labelled token.
        broken: (sequences read,) whether a labelled token has a loss that is NaN or infinite.
    """

    values: Floats
    ordinals: np.ndarray
    tokens: np.ndarray
    means: Floats
    broken: np.ndarray


@dataclass(frozen=True)
class ScanData:
    """Data of the page, without single tokens."""

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
        """Whether any gradient norm is above 0; if not, the writer measured none."""
        return bool(np.isfinite(self.totals.gradient).any())


def collect(reader: MscanReader, name: str) -> ScanData:
    """Reads totals, losses and configuration.

    Args:
        reader: an open file.
        name: name of the file on the page.

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
    """Per-block totals of the whole file; NaN without a counted token."""
    total = file_integral(reader, grid)
    seen = total.count > 0
    return Totals(
        integral=total.sps,
        sps=total.sps / np.maximum(total.count, 1),
        activation=np.where(seen, total.activation_mean, np.nan),
        # A writer that stores only zeros measured nothing, so the map is blank rather than zero.
        gradient=np.where(seen & (total.grad_mean > 0).any(), total.grad_mean, np.nan),
        count=total.count,
    )


def read_losses(reader: MscanReader) -> LossSummary:
    """Losses of all sequences, or of an even sample of LOSS_SEQUENCES."""
    ordinals = even_sample(len(reader.sequences), LOSS_SEQUENCES)
    values: list[Floats] = []
    tokens = np.zeros(len(ordinals), dtype=np.int64)
    means = np.full(len(ordinals), np.nan)
    broken = np.zeros(len(ordinals), dtype=bool)
    for row, ordinal in enumerate(ordinals):
        sequence = reader.sequences[int(ordinal)]
        tokens[row] = sequence.num_tokens
        loss = np.asarray(sequence.loss, dtype=np.float64)
        finite = loss[np.isfinite(loss)]
        broken[row] = loss_is_broken(loss, reader.metadata)
        if len(finite):
            means[row] = finite.mean()
            values.append(finite)
    return LossSummary(np.concatenate(values) if values else np.empty(0), ordinals, tokens, means, broken)


def loss_is_broken(loss: Floats, metadata: Mapping[str, Any]) -> bool:
    """Whether a labelled token of a sequence has a loss, of (tokens,), that is not finite.

    A scan of this library labels all tokens but the last. In files of other writers NaN may also mark a token without a label.
    """
    return bool(np.isinf(loss).any() or (is_scan(metadata) and np.isnan(loss[:-1]).any()))


def is_scan(metadata: Mapping[str, Any]) -> bool:
    """Whether `tinyonn scan` wrote a file, by its metadata."""
    return "config_hash" in metadata and metadata.get("reduction") == "sum"


def _notes(data: ScanData) -> list[str]:
    notes = _not_finite_notes(data)
    if not data.has_gradient and data.num_sequences and not notes:
        notes.append(
            "Every gradient norm in this file is 0 or missing: its writer measured none. SPS then consists of the activation term alone."
        )
    if data.num_sequences == 0:
        notes.append("The file holds no complete sequence.")
    elif not len(data.losses.values) and not data.losses.broken.any():
        notes.append("No token of this file has a loss.")
    if data.num_sequences > len(data.losses.ordinals):
        notes.append(f"Losses are those of {len(data.losses.ordinals):,} sequences, evenly spaced among {data.num_sequences:,}.")
    # Notes of the version 1 reader about the file's writer.
    notes.extend(str(line) for line in data.metadata.get(V1_NOTES, ()) if isinstance(data.metadata[V1_NOTES], list))
    never = int((data.totals.count == 0).sum())
    if never and data.num_sequences and never < data.grid.num_blocks:
        notes.append(f"{never:,} of {data.grid.num_blocks:,} blocks were never recorded and are left blank.")
    notes.extend(f"Not measured: {line}." for line in _not_measured(data))
    return notes


def _not_measured(data: ScanData) -> list[str]:
    """Names and reasons of the weights that the scan left out, and of those in the layout without a value."""
    stored = data.metadata.get("not_measured")
    reasons = {str(why): [str(name) for name in names] for why, names in stored.items()} if isinstance(stored, dict) else {}
    silent = data.totals.count == 0
    if data.num_sequences and not silent.all():
        of_weight = np.bincount(data.grid.entry, weights=~silent, minlength=len(data.grid.layout))
        reasons |= without_value(entry.name for entry, count in zip(data.grid.layout, of_weight, strict=True) if count == 0)
    return describe(reasons)


def _not_finite_notes(data: ScanData) -> list[str]:
    """Notes on losses and norms that are not finite in the scan's precision."""
    losses, dtype = data.losses, data.metadata.get("dtype")
    if broken := int(losses.broken.sum()):
        words = f"The loss of {broken:,} of {len(losses.ordinals):,} sequences is not finite, nor are their gradients."
        return [f"{words} The maps and sums leave such tokens out. {not_finite_cause(dtype)}"]
    # Weights of experts see only some tokens; every other weight sees all.
    dense = np.array([not entry.name.rpartition(".")[2].isdigit() for entry in data.grid.layout])[data.grid.entry]
    if not is_scan(data.metadata) or len(losses.ordinals) < data.num_sequences or not dense.any():
        return []
    labelled = int(np.maximum(losses.tokens - 1, 0).sum())
    lost = labelled - int(data.totals.count[dense].max())
    if lost > 0:
        return [f"The norms of {lost:,} of {labelled:,} tokens are not finite. The maps and sums leave them out. {not_finite_cause(dtype)}"]
    return []
