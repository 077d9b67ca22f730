"""Reader that presents a set of files, one per rank, as one file."""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MscanError
from .opening import rank_members, version_of
from .reader import MscanReader, PlaneCodes, StoredSequence, StoredSequences
from .stats import ModuleStats
from .types import Integral
from .v2 import V2Reader

RANK_KEYS = frozenset({"rank", "model_path"})  # metadata in which the members of a set may differ


class RankSetReader(MscanReader, reads=None):
    """Reads `name.rankI-of-N.mscan`, I = 0 … N−1: the sequences of rank 0, then those of rank 1, and so on; see `MscanReader`.

    Raises:
        MscanError: a member is missing, of version 1 or a copy of another, or metadata (except the key `rank`) or layout of two members
            differ. With recovery "salvage" a copy is reported, not refused.
    """

    version = 2

    def __init__(self, path: str | os.PathLike[str], *, recovery: str = "tail", whole_set: bool = True) -> None:
        self.path = os.fspath(path)
        self.recovery = recovery
        paths = rank_members(self.path)
        if paths is None:
            raise InputError(f"path must name a set of rank files, got {self.path}.")
        with ExitStack() as opened:
            self.members = [opened.enter_context(_member(path, recovery)) for path in paths]
            first = self.members[0]
            self.metadata = _shared(first.metadata)
            for member in self.members[1:]:
                if _shared(member.metadata) != self.metadata:
                    raise MscanError(member.path, f"metadata of a set must agree with that of {os.path.basename(first.path)}.")
                if member.layout != first.layout:
                    raise MscanError(member.path, f"layout of a set must agree with that of {os.path.basename(first.path)}.")
            copies = self._copies()
            if copies and recovery != "salvage":
                raise MscanError(*copies[0])
            self._opened = opened.pop_all()
        self.layout = first.layout
        self.report = [f"{os.path.basename(path)}: {rule}" for path, rule in copies]
        self.report += [f"{os.path.basename(member.path)}: {line}" for member in self.members for line in member.report]
        self.starts = [0, *accumulate(len(member) for member in self.members)]
        self.sequences = StoredSequences(lambda: self.starts[-1], self._sequence)

    def _copies(self) -> list[tuple[str, str]]:
        """Members with the UUID of an earlier member, each with the broken rule: the data of their own rank is missing."""
        seen: dict[bytes, str] = {}
        found = []
        for member in self.members:
            other = seen.setdefault(member.uuid, member.path)
            if other != member.path:
                found.append((member.path, f"members of a set must be different files, got a copy of {os.path.basename(other)}."))
        return found

    def locate(self, i: int) -> tuple[V2Reader, int, int]:
        """The member that holds sequence i, its ordinal there, and its ordinal in the set."""
        ordinal = self.ordinal(i)
        rank = bisect_right(self.starts, ordinal) - 1
        return self.members[rank], ordinal - self.starts[rank], ordinal

    def _sequence(self, i: int) -> StoredSequence:
        member, local, ordinal = self.locate(i)
        return replace(member.sequences[local], ordinal=ordinal)

    def planes(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        member, local, _ = self.locate(i)
        return member.planes(local)

    def codes(self, i: int) -> list[PlaneCodes]:
        member, local, _ = self.locate(i)
        return member.codes(local)

    def sequence_integral(self, i: int) -> Integral | None:
        member, local, _ = self.locate(i)
        return member.sequence_integral(local)

    def integral(self) -> Integral:
        return reduce(lambda a, b: a + b, (member.integral() for member in self.members))

    def stats(self) -> ModuleStats:
        return reduce(lambda a, b: a + b, (member.stats() for member in self.members))

    def find(self, sequence_id: str) -> int | None:
        for start, member in zip(self.starts, self.members, strict=False):
            local = member.find(sequence_id)
            if local is not None:
                return start + local
        return None

    def verify(self) -> None:
        for member in self.members:
            member.verify()

    def close(self) -> None:
        self._opened.close()


def _member(path: str, recovery: str) -> V2Reader:
    try:
        version = version_of(path)
    except MscanError:  # damaged: the reader reports how, or reads the valid part
        version = None
    if version == 1:
        remedy = "rename it, then convert it to version 2 with `tinyonn convert`"
        raise MscanError(path, f"files of a set must be of version 2, got version 1; {remedy}.")
    return V2Reader(path, recovery=recovery)


def _shared(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in RANK_KEYS}
