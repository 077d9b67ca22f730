"""Samples of a comparison: mean SPS per sequence and block, and the check that two files are comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._io.units import not_finite_cause
from ...errors import InputError
from ...mscan import LayoutEntry, MscanReader
from .data import is_scan, loss_is_broken
from .grid import BlockGrid, build_grid, even_sample
from .integrals import sequence_integral
from .statistics import MIN_SEQUENCES

# Of more sequences per side an even sample is used: the intervals are narrow then, and the time grows.
MAX_SEQUENCES = 4000
# Limit of values per side (float32: 1 GiB), for models with very many blocks.
MAX_VALUES = 1 << 28

# Keys that must agree for numbers to be comparable. Files of other writers may lack a key, which is then not compared.
_MUST_AGREE = ("credit", "reduction", "block_size")
# Keys that may differ; the page lists the differences.
_SAID = ("dtype", "max_length", "generate", "transformers", "tinyonn")


@dataclass(frozen=True)
class TopicSample:
    """One side of a comparison.

    Attributes:
        name: file name.
        topic: topic in the metadata, or the file's stem.
        metadata: metadata of the file.
        grid: blocks of the file.
        sps: (sequences, blocks) float32 mean SPS of a sequence's tokens; NaN for a block without tokens.
        tokens: number of tokens of those sequences.
        texts: digests of the sequences' token ids.
        notes: notes for the reader of the page.
    """

    name: str
    topic: str
    metadata: Mapping[str, Any]
    grid: BlockGrid
    sps: npt.NDArray[np.float32]
    tokens: int
    texts: frozenset[bytes]
    notes: list[str] = field(default_factory=list)


def read_sample(reader: MscanReader, name: str) -> TopicSample:
    """Mean SPS per sequence, from the stored integrals or, without them, from the planes.

    Raises:
        InputError: fewer than MIN_SEQUENCES sequences have SPS.
        MscanError: the file is damaged.
    """
    grid = build_grid(reader.layout)
    total = len(reader.sequences)
    limit = max(MIN_SEQUENCES, min(MAX_SEQUENCES, MAX_VALUES // max(grid.num_blocks, 1)))
    chosen = even_sample(total, limit)
    sps = np.full((len(chosen), grid.num_blocks), np.nan, dtype=np.float32)
    texts, tokens, broken = set(), 0, 0
    for row, ordinal in enumerate(chosen):
        sequence = reader.sequences[int(ordinal)]
        tokens += int(sequence.num_tokens)
        texts.add(hashlib.blake2b(np.asarray(sequence.token_ids, dtype=np.int64).tobytes(), digest_size=16).digest())
        if loss_is_broken(np.asarray(sequence.loss, dtype=np.float64), reader.metadata):
            broken += 1  # its gradients are not finite either
            continue
        found = sequence_integral(reader, int(ordinal), grid)
        if found is not None:
            sps[row] = found.sps / np.maximum(found.count, 1)
    measured = np.isfinite(sps).any(axis=1)
    if measured.sum() < MIN_SEQUENCES:
        lost = int((~measured).sum())
        reason = "intervals over fewer are meaningless; scan more sequences."
        if total >= MIN_SEQUENCES and is_scan(reader.metadata):
            what = f"the loss of {broken:,} is not finite" if broken else f"the norms of {lost:,} are not finite"
            reason = f"{what}. {not_finite_cause(reader.metadata.get('dtype'))}"
        raise InputError(f"{name} must hold at least {MIN_SEQUENCES} sequences with SPS, got {int(measured.sum())} of {total:,}: {reason}")
    notes = []
    if len(chosen) < total:
        notes.append(f"{name}: {len(chosen):,} of {total:,} sequences are compared, evenly spaced.")
    if broken:
        cause = not_finite_cause(reader.metadata.get("dtype"))
        notes.append(f"{name}: {broken:,} of {total:,} sequences have a loss that is not finite; they are left out. {cause}")
    if without := int((~measured).sum()) - broken:
        notes.append(f"{name}: {without:,} sequences without SPS are left out.")
    notes.extend(f"{name} is damaged: {line}" for line in reader.report)
    topic = reader.metadata.get("topic")
    return TopicSample(
        name=name,
        topic=topic if isinstance(topic, str) and topic else Path(name).stem,
        metadata=dict(reader.metadata),
        grid=grid,
        sps=sps if measured.all() else sps[measured],
        tokens=tokens,
        texts=frozenset(texts),
        notes=notes,
    )


def check_comparable(a: MscanReader, b: MscanReader, name_a: str, name_b: str) -> None:
    """Checks that two files have the same blocks and measures.

    Raises:
        InputError: they differ in model, credit, reduction, block size or layout; the message names the first difference.
    """
    for key, label in (("model_weights_sha256", "model weights"), ("model", "model")):
        one, other = a.metadata.get(key), b.metadata.get(key)
        if one is not None and other is not None:
            if one != other:
                raise InputError(f"{name_a} and {name_b} must be scans of one model, got {label} {_brief(one)} and {_brief(other)}.")
            break  # equal weights under two names are one model
    for key in _MUST_AGREE:
        one, other = a.metadata.get(key), b.metadata.get(key)
        if one is not None and other is not None and one != other:
            raise InputError(f"{name_a} and {name_b} must have the same {key}, got {_brief(one)} and {_brief(other)}.")
    difference = _layout_difference(list(a.layout), list(b.layout))
    if difference:
        raise InputError(f"{name_a} and {name_b} must have one layout, got {difference}.")


def comparison_notes(a: TopicSample, b: TopicSample) -> list[str]:
    """Notes on differences that do not prevent a comparison."""
    notes = [*a.notes, *b.notes]
    shared = len(a.texts & b.texts)
    if shared:
        notes.append(f"{shared:,} sequences occur on both sides. They are not independent evidence, and reduce every difference.")
    notes.extend(
        f"The scans differ in {key}: {_brief(a.metadata.get(key))} and {_brief(b.metadata.get(key))}."
        for key in _SAID
        if key in a.metadata and key in b.metadata and a.metadata[key] != b.metadata[key]
    )
    if ("tied_head" in a.metadata) != ("tied_head" in b.metadata) and is_scan(a.metadata) and is_scan(b.metadata):
        notes.append("One scan is from an earlier version, whose gradients of a tied output head lack the part of the embedding.")
    return notes


def _layout_difference(a: list[LayoutEntry], b: list[LayoutEntry]) -> str:
    for one, other in zip(a, b, strict=False):
        if one.name != other.name:
            return f"{one.name} and {other.name} at the same place"
        if (one.out_features, one.blocks) != (other.out_features, other.blocks):
            return f"{one.name} with {one.out_features} features in {one.blocks} blocks and with {other.out_features} in {other.blocks}"
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} weights"
    return ""


def _brief(value: object) -> str:
    shown = str(value)
    return shown if len(shown) <= 40 else f"{shown[:12]}…"
