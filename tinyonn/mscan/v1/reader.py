"""Reader of `.mscan` version 1, with the interface of `MscanReader`.

Planes are built from a sequence's records: one column per (parameter, block), NaN without a record. Values are the
writer's unsigned 16-bit integers; no known version 1 file states a scale, so none is applied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..._io.options import one_of
from ...errors import MscanError
from ..layout import LayoutEntry, group_name, layout_blocks, layout_groups
from ..reader import MscanReader, PlaneCodes
from ..stats import ModuleStats
from ..types import Integral
from .header import PROLOGUE, RECORD, RECOVERY, read_header, read_prologue
from .records import index_records, read_records
from .sums import integrate, plane_stats

CELLS_PER_RECORD = 4096  # sparser planes mean a damaged file
SMALL_PLANE = 1 << 20  # cells allowed at any sparsity
MAX_TOKENS = 1 << 24  # of one sequence
SAMPLED_RECORDS = 4096  # sample that decides where records begin
FEATURES_PER_BLOCK = 64  # version 1 does not store the features of a weight, so every block counts as full

NOTES = (
    "values are the version 1 writer's unsigned 16-bit integers; the file does not state their scale",
    "token_ids are version 1's running token_idx, not entries of a vocabulary; it stored no losses",
)
ZERO_GRADIENTS = "every grad_norm is 0: writers of version 1.1 truncated them to integers, so they are not a measurement"


@dataclass(frozen=True, eq=False)
class V1Sequence:
    """One sequence: version 1 has no losses (NaN) and no token ids (the running token_idx replaces them)."""

    sequence_id: str
    num_tokens: int
    ordinal: int
    text: str | None
    has_records: bool
    first_token: int

    lost_tokens: ClassVar[int] = 0  # records are whole; `report` counts the others
    lost_integral: ClassVar[bool] = False

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return np.arange(self.first_token, self.first_token + self.num_tokens, dtype=np.int64)

    @property
    def loss(self) -> NDArray[np.float32]:
        return np.full(self.num_tokens, np.nan, np.float32)

    @property
    def mask(self) -> NDArray[np.uint8]:
        return np.ones(self.num_tokens, np.uint8)


class V1Reader(MscanReader, reads=1):
    """Reads a version 1 file.

    Args:
        path: the file.
        recovery: "strict" accepts only a complete file, "tail" also a truncated one. "salvage" also accepts a file whose first
            records a longer header overwrote or that was never closed, and omits records of unknown parameters or tokens.

    Raises:
        MscanError: the file breaks a rule that `recovery` does not tolerate; names the byte.
        InputError: `recovery` is not one of the three.
    """

    version = 1

    def __init__(self, path: str | os.PathLike[str], *, recovery: str = "tail", whole_set: bool = True) -> None:
        self.path = os.fspath(path)
        self.recovery = one_of(*RECOVERY)(recovery, "recovery")
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._fd).st_size
        version, length, _ = read_prologue(self.path, os.pread(self._fd, PROLOGUE.size, 0))
        if version != 1:
            raise MscanError(self.path, f"version must be 1 here, got {version}.", 5)
        head = os.pread(self._fd, min(size, length + PROLOGUE.size), 0)
        self.header = read_header(self.path, head, size, self.recovery, self._plausible)
        names = _parameter_names(self.path, self.header.metadata)
        listed = _listed_sequences(self.path, self.header.metadata)
        self._known = np.zeros(1 << 16, bool)
        self._known[list(names)] = True
        index = index_records(self.path, self._fd, self.header, self._known, [tokens for _, tokens, _ in listed], self.recovery)
        self._segments = index.segments[np.argsort(index.segments[:, 2], kind="stable")]
        self.layout, self._column = _layout(names, index.blocks)
        if not listed and self.header.records:
            listed = [("0", int(index.bounds[1]), None)]
        owned = np.bincount(index.segments[:, 2], weights=index.segments[:, 1] - index.segments[:, 0], minlength=len(listed))
        self.sequences: Sequence[V1Sequence] = [
            V1Sequence(name, tokens, i, text, bool(owned[i]), int(index.bounds[i])) for i, (name, tokens, text) in enumerate(listed)
        ]
        notes = [*NOTES, *([ZERO_GRADIENTS] if index.zero_gradients else [])]
        self.metadata: dict[str, Any] = {**self.header.metadata, "version_1_notes": notes}
        self.report = [*self.header.lost]
        if index.invalid:
            self.report.append(f"{index.invalid} records of a parameter or token that does not exist")

    def _plausible(self, metadata: dict[str, Any], offset: int) -> bool:
        data = os.pread(self._fd, RECORD.itemsize * SAMPLED_RECORDS, offset)
        records = np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)
        tokens = sum(count for _, count, _ in _listed_sequences(self.path, metadata)) or 1 << 32
        valid = np.isin(records["param_id"], list(_parameter_names(self.path, metadata))) & (records["token_idx"] < tokens)
        return bool(2 * np.count_nonzero(valid) >= records.size)

    def records(self, i: int) -> np.ndarray:
        """Records of sequence i in file order, of the packed version 1 dtype."""
        sequence = self.sequences[i].ordinal
        first, end = np.searchsorted(self._segments[:, 2], [sequence, sequence + 1])
        pieces = [read_records(self.path, self._fd, self.header, int(a), int(b)) for a, b, _ in self._segments[first:end]]
        records = np.concatenate([np.empty(0, RECORD), *pieces])
        return records[self._known[records["param_id"]]]

    def planes(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Activation and gradient norms of sequence i, (tokens, blocks) float32 each, NaN without a record.

        Raises:
            MscanError: two records have the same token and block, or too few records exist for planes of that size.
        """
        sequence, records = self.sequences[i], self.records(i)
        shape = (sequence.num_tokens, layout_blocks(self.layout))
        cells = shape[0] * shape[1]
        if cells > max(SMALL_PLANE, CELLS_PER_RECORD * records.size):
            rule = f"must fill more of its {shape[0]} x {shape[1]} values than {records.size} records do."
            raise MscanError(self.path, f"sequence {sequence.sequence_id!r} {rule}")
        column = self._column[records["param_id"]] + records["block_idx"]
        flat = (records["token_idx"].astype(np.int64) - sequence.first_token) * shape[1] + column
        activation = np.full(cells, np.nan, np.float32)
        activation[flat] = records["activation"]
        if self.recovery != "salvage" and np.count_nonzero(~np.isnan(activation)) != records.size:
            order = np.argsort(flat, kind="stable")
            twice = records[order[1:][np.diff(flat[order]) == 0].min()]
            raise MscanError(
                self.path,
                f"sequence {sequence.sequence_id!r} must have one record a token and block, got several of token {twice['token_idx']}, "
                f"parameter {twice['param_id']}, block {twice['block_idx']}.",
            )
        grad_norm = np.full(cells, np.nan, np.float32)
        grad_norm[flat] = records["grad_norm"]
        return activation.reshape(shape), grad_norm.reshape(shape)

    def codes(self, i: int) -> list[PlaneCodes]:
        """Planes of sequence i as float32 values; `records` returns the stored numbers."""
        return [PlaneCodes(0, *self.planes(i), (0.0, 0.0), (0.0, 0.0), None, None)]

    def sequence_integral(self, i: int) -> Integral | None:
        """∫SPS and moments of sequence i, computed from its planes; None without a record."""
        if not self.sequences[i].has_records:
            return None
        return integrate(*self.planes(i), layout_groups(self.layout)[1])

    def integral(self) -> Integral:
        """∫SPS and moments of the whole file, computed from every plane."""
        total = Integral.zeros(layout_blocks(self.layout))
        for sequence in self.sequences:
            found = self.sequence_integral(sequence.ordinal)
            total = total if found is None else total + found
        return total

    def stats(self) -> ModuleStats:
        """Statistics of each weight, computed from every plane."""
        bases = [entry.base for entry in self.layout]
        columns = [entry.blocks for entry in self.layout]
        none = np.zeros((len(bases), 2, 4), np.uint64), np.zeros((len(bases), 2, 2))
        total = ModuleStats.from_arrays([entry.name for entry in self.layout], *none)
        for sequence in self.sequences:
            if sequence.has_records:
                planes = [plane_stats(plane.astype(np.float64), bases, columns) for plane in self.planes(sequence.ordinal)]
                total += ModuleStats(total.names, *planes)
        return total

    def find(self, sequence_id: str) -> int | None:
        return next((s.ordinal for s in self.sequences if s.sequence_id == sequence_id), None)

    def verify(self) -> None:
        """Checks that the record count fits the file, and that each token and block has at most one record."""
        with V1Reader(self.path, recovery="strict") as strict:
            for sequence in strict.sequences:
                strict.planes(sequence.ordinal)

    def close(self) -> None:
        """Closes the file; reading planes afterwards fails."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parameter_names(path: str, metadata: dict[str, Any]) -> dict[int, str]:
    named = metadata.get("id_to_param_name_map", {})
    wrong = MscanError(path, "id_to_param_name_map must map ids 0 … 65535 to names.", PROLOGUE.size)
    if not isinstance(named, dict) or not all(isinstance(name, str) and re.fullmatch(r"[0-9]{1,5}", key) for key, name in named.items()):
        raise wrong
    names = {int(key): name for key, name in named.items()}
    if max(names, default=0) > 0xFFFF:
        raise wrong
    if len(set(named.values())) < len(named) or len(names) < len(named):
        raise MscanError(path, "id_to_param_name_map must name every parameter once.", PROLOGUE.size)
    return names


def _listed_sequences(path: str, metadata: dict[str, Any]) -> list[tuple[str, int, str | None]]:
    listed = metadata.get("sequences", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise MscanError(path, "sequences must be a list of JSON objects.", PROLOGUE.size)
    result, used, total = [], set(), 0
    for ordinal, entry in enumerate(listed):
        tokens, text = entry.get("num_tokens"), entry.get("source")
        if type(tokens) is not int or not 0 <= tokens <= min(MAX_TOKENS, (1 << 32) - total):
            rule = f"num_tokens of sequence {ordinal} must be an integer up to {MAX_TOKENS}, at most 2^32 over all sequences"
            raise MscanError(path, f"{rule}, got {tokens!r:.40}.", PROLOGUE.size)
        name = str(entry.get("sequence_id", ordinal))
        name = name if name not in used else f"{name}.{ordinal}"
        used.add(name)
        total += tokens
        result.append((name, tokens, text if isinstance(text, str) else None))
    return result


def _layout(names: dict[int, str], blocks: np.ndarray) -> tuple[list[LayoutEntry], np.ndarray]:
    # Layers in numerical order, then weights outside all layers; within a layer the order of the ids.
    def place(param: int) -> tuple[bool, list[tuple[bool, int, str]], int]:
        parts = group_name(names[param]).split(".")
        in_layer = any(part.isdecimal() for part in parts)
        return not in_layer, [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts], param

    layout: list[LayoutEntry] = []
    column = np.zeros(1 << 16, np.int64)
    for param in sorted((int(p) for p in np.flatnonzero(blocks)), key=place):
        base, count = layout_blocks(layout), int(blocks[param])
        column[param] = base
        layout.append(LayoutEntry(names[param], count * FEATURES_PER_BLOCK, count, base))
    return layout, column
