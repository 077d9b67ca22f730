"""Opens `.mscan` files of any kind: version 2, version 1, and sets that several ranks wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from .layout import LayoutEntry
from .opening import rank_members, version_of
from .stats import ModuleStats
from .types import Integral


@dataclass(frozen=True, slots=True, eq=False)
class StoredSequence:
    """One sequence of a file.

    Attributes:
        sequence_id, text: as appended; None for a text that was not stored.
        token_ids: (tokens,) int64.
        loss: (tokens,) float32, NaN = unlabelled.
        mask: (tokens,) uint8, 1 = marked.
        num_tokens: number of tokens.
        ordinal: position among the reader's sequences.
        has_records: whether planes were stored and some of them can be read.
        lost_tokens: number of tokens whose stored planes are lost; they read as NaN. 0 unless recovery is "salvage".
        lost_integral: whether a stored integral is lost. False unless recovery is "salvage".
    """

    sequence_id: str
    token_ids: NDArray[np.int64]
    loss: NDArray[np.float32]
    mask: NDArray[np.uint8]
    text: str | None
    num_tokens: int
    ordinal: int
    has_records: bool
    lost_tokens: int = 0
    lost_integral: bool = False


class StoredSequences(Sequence[StoredSequence]):
    """The sequences of a file or set, each read on access.

    Args:
        count: returns the number of sequences.
        read: returns the sequence at an ordinal, counted from either end; raises IndexError.
    """

    def __init__(self, count: Callable[[], int], read: Callable[[int], StoredSequence]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count()

    @overload
    def __getitem__(self, i: int) -> StoredSequence: ...
    @overload
    def __getitem__(self, i: slice) -> list[StoredSequence]: ...
    def __getitem__(self, i: int | slice) -> StoredSequence | list[StoredSequence]:
        if isinstance(i, slice):
            return [self._read(k) for k in range(*i.indices(len(self)))]
        return self._read(i)

    def __iter__(self) -> Iterator[StoredSequence]:
        return (self._read(i) for i in range(len(self)))


class PlaneCodes(NamedTuple):
    """Stored planes of consecutive tokens: read-only views of the mapped file, or of a decompressed copy.

    Attributes:
        first_token: first token of these planes.
        activation, grad_norm: uint16 codes or float32 values, (tokens, columns); (values,) where sparse.
        activation_range, grad_range: (lo, hi), log2 of the values of codes 1 and 65533.
        rows: (tokens + 1,) uint64, start of each token's values; None unless sparse.
        columns: (values,) uint32, column of each value; None unless sparse.
    """

    first_token: int
    activation: NDArray[Any]
    grad_norm: NDArray[Any]
    activation_range: tuple[float, float]
    grad_range: tuple[float, float]
    rows: NDArray[np.uint64] | None
    columns: NDArray[np.uint32] | None


class MscanReader:
    """Reads a `.mscan` file; `MscanReader(path)` returns the reader that the file needs.

    Args:
        path: a file; or one member of a set `name.rankI-of-N.mscan`, or `name.mscan` if only the set exists, which opens the whole set.
        recovery: "strict" requires a trailer and runs `verify` on opening. "tail" drops an incomplete end of the file and lists it in
            `report`; damage before valid chunks is an error. "salvage" reads around damage and reports each gap.
        whole_set: False opens a single member of a set.

    Raises:
        MscanError: the file breaks a rule of the format, on opening or when the affected part is first read.
        FileNotFoundError: the file does not exist.

    The file is mapped: if another process truncates it while it is open, this process ends with a bus error.

    Attributes:
        path: path of the file.
        recovery: recovery mode.
        version: 1 or 2.
        metadata: the writer's metadata.
        layout: entries in column order.
        sequences: sequences of the file, each read on access.
        report: one line for each part that recovery left out.
    """

    _kinds: ClassVar[dict[int | None, type[MscanReader]]] = {}  # version, or None for a set -> its reader

    path: str
    recovery: str
    version: int
    metadata: dict[str, Any]
    layout: list[LayoutEntry]
    sequences: Sequence[Any]
    report: list[str]

    def __new__(cls, path: str | os.PathLike[str], *, recovery: str = "tail", whole_set: bool = True) -> Any:
        kind = cls
        if cls is MscanReader:
            place = os.fspath(path)
            kind = cls._kinds[None if whole_set and rank_members(place) is not None else version_of(place)]
        return super().__new__(kind)

    def __init_subclass__(cls, *, reads: int | None) -> None:
        MscanReader._kinds[reads] = cls

    def ordinal(self, i: int) -> int:
        """i counted from the front.

        Raises:
            IndexError: sequence i does not exist.
        """
        count = len(self)
        if not -count <= i < count:
            raise IndexError(f"sequence {i} of {count}")
        return i + count if i < 0 else int(i)

    def planes(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Activation and gradient norms of sequence i, (tokens, blocks) float32 each; NaN = missing.

        Raises:
            MscanError: sequence i was stored without planes.
        """
        raise NotImplementedError

    def codes(self, i: int) -> list[PlaneCodes]:
        """Stored planes of sequence i, one item per chunk of tokens; the arrays keep the file mapped."""
        raise NotImplementedError

    def sequence_integral(self, i: int) -> Integral | None:
        """∫SPS and moments of sequence i, or None if they were not stored."""
        raise NotImplementedError

    def integral(self) -> Integral:
        """∫SPS and moments of the file: the stored total if no sequence was appended after it, else the sum over sequences.

        Raises:
            MscanError: the file has no total, and a sequence has no integral.
        """
        raise NotImplementedError

    def stats(self) -> ModuleStats:
        """Statistics of each weight over all stored planes.

        The index stores the statistics of the values as they were appended, so no plane is read. Sequences after the last index of a
        file that was never closed are decoded, so their values are rounded by the codec.
        """
        raise NotImplementedError

    def find(self, sequence_id: str) -> int | None:
        """Ordinal of the first sequence with this id, or None."""
        raise NotImplementedError

    def verify(self) -> None:
        """Checks every rule of the format on a closed file: checksums, committed groups, the order of the chunks, compressed frames, and
        the agreement of index and chunks. Opening with recovery "strict" runs the same checks.

        Raises:
            MscanError: the first broken rule.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Closes the file; arrays from `codes` stay valid."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.sequences)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
