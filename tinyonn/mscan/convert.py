"""Whole-file operations: convert, merge, recover, verify, describe.

Every output is written under a temporary name and renamed when it is complete. An output that exists is refused unless
`overwrite=True`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MscanError, shown
from .export import to_npz, to_parquet
from .layout import LayoutEntry, layer_count, layout_blocks, layout_groups
from .opening import rank_members
from .output import Conversion, PathLike, replacing
from .reader import MscanReader
from .types import SequenceRecord
from .writer import MscanWriter

__all__ = [
    "Conversion",
    "Description",
    "Verification",
    "convert_v1",
    "describe",
    "merge",
    "recover",
    "to_npz",
    "to_parquet",
    "verify",
]


@dataclass(frozen=True)
class Verification:
    """Whether every rule of the format holds for a file.

    Args:
        path: the file.
        version: format version; None if it cannot be read.
        sequences, tokens: number that can be read, with recovery where needed.
        size: size in bytes.
        failure: the first broken rule, with its byte offset; None if all rules hold.
    """

    path: Path
    version: int | None
    sequences: int
    tokens: int
    size: int
    failure: MscanError | None

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass(frozen=True)
class Description:
    """Contents of a file, read without its planes.

    Args:
        path, version, size: the file, its format version and its size in bytes.
        metadata: as written.
        layout: the weights; `groups` lists the layers they belong to.
        sequences, tokens: number of sequences and tokens.
        sequences_with_planes: number of sequences with values per token and block.
        missing: lines on everything that the reader left out.
    """

    path: Path
    version: int
    size: int
    metadata: dict[str, Any]
    layout: list[LayoutEntry]
    groups: list[str]
    sequences: int
    tokens: int
    sequences_with_planes: int
    missing: list[str]

    @property
    def layers(self) -> int:
        """Decoder layers with at least one weight."""
        return layer_count(self.groups)

    @property
    def blocks(self) -> int:
        return layout_blocks(self.layout)

    @property
    def bytes_per_value(self) -> float:
        """File bytes per stored norm (two per token and block); NaN without tokens."""
        values = 2 * self.tokens * self.blocks
        return self.size / values if values else float("nan")


def convert_v1(path: PathLike, output: PathLike, *, recovery: str = "tail", overwrite: bool = False, **options: Any) -> Conversion:
    """Converts a version 1 file to version 2, with the integral of each sequence; values and metadata are unchanged.

    Args:
        path: a version 1 file.
        output: the new file.
        recovery: "salvage" also converts a damaged file and lists what is missing.
        overwrite: replace an output that exists.
        options: codec and compression of `MscanWriter`; the default codec is "f32", which keeps integers exact.

    Raises:
        InputError: the file is not of version 1, or the output exists.
        MscanError: the file breaks a rule that `recovery` does not tolerate.
    """
    with MscanReader(path, recovery=recovery) as reader:
        if reader.version != 1:
            raise InputError(f"{os.fspath(path)} must be of version 1, got {reader.version}.")
        return _copy([reader], output, dict(reader.metadata), overwrite, options)


def merge(paths: Sequence[PathLike], output: PathLike, *, overwrite: bool = False, **options: Any) -> Conversion:
    """Merges several files, or a set of ranks, into one.

    Args:
        paths: files whose layouts agree, where one layout may extend another; or one name of a rank set.
        output: the new file, with the metadata of the first and, under "merged", the names of all.
        options: codec and compression of `MscanWriter`; the default codec is that of the source.

    Raises:
        InputError: no path, different layouts, a repeated sequence id, or an output that exists.
    """
    if not paths:
        raise InputError("paths must hold at least one file, got none.")
    with ExitStack() as stack:
        readers = [stack.enter_context(MscanReader(path)) for path in paths]
        metadata = {**readers[0].metadata, "merged": [Path(path).name for path in paths]}
        return _copy(readers, output, metadata, overwrite, options)


def recover(path: PathLike, output: PathLike, *, overwrite: bool = False, **options: Any) -> Conversion:
    """Writes the readable parts of a damaged file of either version as a clean version 2 file.

    Args:
        path: the damaged file, which is not changed.
        output: the clean file.
        options: codec and compression of `MscanWriter`; the default codec is that of the source.

    Returns:
        The conversion; `dropped` lists every gap, every sequence that was lost or occurs twice, the number of sequences that lost the
        values of some tokens, which read as missing, and the number that lost their integral. Of two sequences with one id the first
        whole one is kept.
    """
    with MscanReader(path, recovery="salvage") as reader:
        return _copy([reader], output, dict(reader.metadata), overwrite, options, salvage=True)


def verify(path: PathLike) -> Verification:
    """Reads and checks a whole file as `MscanReader.verify` does. Version 1 has no checksums; its header is compared with its contents.

    Raises:
        OSError: the file cannot be opened.
    """
    size, failure = _size(path), None
    for recovery in ("strict", "salvage"):
        try:
            with MscanReader(path, recovery=recovery) as reader:
                if reader.version == 1 and failure is None:  # has no checksums, and opening it reads no record
                    reader.verify()
                tokens = sum(sequence.num_tokens for sequence in reader.sequences)
                return Verification(Path(path), reader.version, len(reader.sequences), tokens, size, failure)
        except MscanError as error:
            failure = failure or error
    return Verification(Path(path), None, 0, 0, size, failure)


def describe(path: PathLike, *, recovery: str = "tail") -> Description:
    """Contents of a file or a rank set, read without planes."""
    with MscanReader(path, recovery=recovery) as reader:
        sequences = list(reader.sequences)
        return Description(
            path=Path(path),
            version=reader.version,
            size=_size(path),
            metadata=dict(reader.metadata),
            layout=list(reader.layout),
            groups=layout_groups(reader.layout)[0],
            sequences=len(sequences),
            tokens=sum(s.num_tokens for s in sequences),
            sequences_with_planes=sum(s.has_records for s in sequences),
            missing=[str(item) for item in reader.report],
        )


def _size(path: PathLike) -> int:
    members = rank_members(os.fspath(path)) or [os.fspath(path)]
    return sum(os.stat(member).st_size for member in members)


def _common_layout(readers: Sequence[MscanReader]) -> list[LayoutEntry]:
    widest = max((list(reader.layout) for reader in readers), key=len)
    for reader in readers:
        if list(reader.layout) != widest[: len(reader.layout)]:
            raise InputError(f"layouts of all files must agree, got a different one in {reader.path}.")
    if not widest:
        raise InputError(f"{readers[0].path} must hold records or a layout to be converted.")
    return widest


def _copy(
    readers: Sequence[MscanReader],
    output: PathLike,
    metadata: dict[str, Any],
    overwrite: bool,
    options: dict[str, Any],
    salvage: bool = False,
) -> Conversion:
    dropped = [str(item) for reader in readers for item in reader.report]
    sequences = tokens = blank_sequences = blank_tokens = lost_integrals = 0
    summed = True
    origin: dict[str, str] = {}
    options = {"codec": _codec(readers), **options}
    layout = _common_layout(readers)
    sources = [reader.path for reader in readers]
    with replacing(output, overwrite, sources) as beside, MscanWriter(beside, metadata, layout, **options) as writer:
        for reader in readers:
            kept = _kept(reader) if salvage else {}
            for i in range(len(reader.sequences)):
                try:
                    name = reader.sequences[i].sequence_id if salvage else ""
                    if salvage and kept[name] != i:
                        dropped.append(f"sequence {i}: its id, {shown(name)}, is also the id of sequence {kept[name]}, which is kept.")
                        continue
                    record = _record(reader, i, layout_blocks(layout))
                except MscanError as error:
                    if not salvage:
                        raise
                    dropped.append(f"sequence {i}: {error.rule}")
                    continue
                if record.sequence_id in origin:
                    raise InputError(
                        f"sequence ids must be unique, got {record.sequence_id!r} in {origin[record.sequence_id]} and in {reader.path}."
                    )
                origin[record.sequence_id] = reader.path
                writer.append(record)
                sequences += 1
                tokens += len(record.token_ids)
                summed = summed and record.integral is not None
                if salvage:
                    stored = reader.sequences[i]
                    blank_sequences += stored.lost_tokens > 0
                    blank_tokens += stored.lost_tokens
                    lost_integrals += stored.lost_integral
        if not summed and len(readers) == 1:  # a file may have a total although its sequences have no integrals
            with suppress(MscanError):
                writer.append_integral(readers[0].integral().widened(layout_blocks(layout)))
    if blank_sequences:
        dropped.append(f"values of {blank_tokens:,} tokens in {blank_sequences:,} of the {sequences:,} sequences: they read as missing.")
    if lost_integrals:
        dropped.append(f"integrals of {lost_integrals:,} of the {sequences:,} sequences.")
    return Conversion(Path(output), sequences, tokens, dropped)


def _kept(reader: MscanReader) -> dict[str, int]:
    """Sequence that a recovered file keeps for each id: the first complete one, else the first."""
    kept: dict[str, tuple[bool, int]] = {}
    for i in range(len(reader.sequences)):
        with suppress(MscanError):
            sequence = reader.sequences[i]
            order = (bool(sequence.lost_tokens or sequence.lost_integral), i)
            kept[sequence.sequence_id] = min(order, kept.get(sequence.sequence_id, order))
    return {name: i for name, (_, i) in kept.items()}


def _codec(readers: Sequence[MscanReader]) -> str:
    """Codec of the first readable planes. Encoding them again with it changes at most the last bit."""
    for reader in readers:
        for i in range(len(reader.sequences)):
            try:
                if reader.sequences[i].has_records:
                    return "f32" if reader.codes(i)[0].activation.dtype == np.float32 else "log2u16"
            except (MscanError, IndexError):  # salvage lost the sequence or its chunks
                continue
    return "log2u16"


def _record(reader: MscanReader, i: int, blocks: int) -> SequenceRecord:
    sequence = reader.sequences[i]
    missing = ((0, 0), (0, blocks - layout_blocks(reader.layout)))
    activation = grad_norm = None
    if sequence.has_records or sequence.lost_tokens:  # lost values are written as missing
        activation, grad_norm = (np.pad(plane, missing, constant_values=np.nan) for plane in reader.planes(i))
    integral = reader.sequence_integral(i)
    return SequenceRecord(
        sequence.sequence_id,
        sequence.token_ids,
        sequence.loss,
        activation,
        grad_norm,
        sequence.mask,
        sequence.text,
        None if integral is None else integral.widened(blocks),
    )
