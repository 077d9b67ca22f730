"""Reader of one version 2 file."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..errors import MscanError
from .compression import decompress
from .layout import LayoutEntry
from .reader import MscanReader, PlaneCodes, StoredSequence, StoredSequences
from .stats import ModuleStats
from .types import Integral

UUID = slice(16, 32)  # in the prologue


def metadata_of(path: str, raw: bytes) -> dict[str, Any]:
    """Parses a file's metadata.

    Raises:
        MscanError: it is not a JSON object.
    """
    try:
        metadata = json.loads(raw.decode())
    except ValueError as error:
        raise MscanError(path, "metadata must be JSON in UTF-8.", 64) from error
    if not isinstance(metadata, dict):
        raise MscanError(path, f"metadata must be a JSON object, got {type(metadata).__name__}.", 64)
    return metadata


def gap_lines(gaps: list[tuple[int, int, str]]) -> list[str]:
    """One line of `report` per gap."""
    return [f"bytes {begin} … {end} left out: {rule}" if begin < end else f"byte {begin}: {rule}" for begin, end, rule in gaps]


class V2Reader(MscanReader, reads=2):
    """Reads one version 2 file; see `MscanReader`. Sequences written before the layout grew have NaN in the new blocks."""

    version = 2

    def __init__(self, path: str | os.PathLike[str], *, recovery: str = "tail", whole_set: bool = True) -> None:
        self.path = os.fspath(path)
        self.recovery = recovery
        self._core: _C.Reader | None = _C.Reader(self.path, recovery, decompress)
        self.metadata = metadata_of(self.path, self._core.metadata)
        self.layout = [LayoutEntry(*row) for row in self._core.layout]
        self.gaps = self._core.gaps
        self.report = gap_lines(self.gaps)
        self.sequences = StoredSequences(lambda: len(self.core), self._sequence)

    @property
    def uuid(self) -> bytes:
        """UUID of the file, 16 bytes; a copy of the file has the same."""
        with open(self.path, "rb") as file:
            return file.read(UUID.stop)[UUID]

    @property
    def core(self) -> _C.Reader:
        """The codec's reader."""
        if self._core is None:
            raise ValueError(f"{self.path} was closed.")
        return self._core

    def _sequence(self, i: int) -> StoredSequence:
        ordinal = self.ordinal(i)
        name, token_ids, loss, mask, text, has_records, lost_tokens, lost_integral = self.core.sequence(ordinal)
        return StoredSequence(name, token_ids, loss, mask, text, len(token_ids), ordinal, has_records, lost_tokens, lost_integral)

    def planes(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.core.planes(self.ordinal(i))

    def codes(self, i: int) -> list[PlaneCodes]:
        return [PlaneCodes(*item) for item in self.core.codes(self.ordinal(i))]

    def sequence_integral(self, i: int) -> Integral | None:
        planes = self.core.integral(self.ordinal(i))
        return None if planes is None else Integral(*planes)

    def integral(self) -> Integral:
        planes = self.core.integral(None)
        return Integral(*(self.core.sum_integrals() if planes is None else planes))

    def stats(self) -> ModuleStats:
        return ModuleStats.from_arrays([entry.name for entry in self.layout], *self.core.stats())

    def find(self, sequence_id: str) -> int | None:
        ordinal = self.core.find(sequence_id)
        return None if ordinal < 0 else ordinal

    def verify(self) -> None:
        self.core.verify()

    def close(self) -> None:
        self._core = None
