"""Writer of version 2 files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence, Set
from types import TracebackType
from typing import Any

from .. import _C
from .._io.options import one_of
from ..errors import InputError, reason
from .compression import compressor, decompress
from .layout import LayoutEntry, check_layout
from .types import Integral, SequenceRecord
from .v2 import gap_lines, metadata_of


class SequenceIds(Set[str]):
    """Ids of the sequences in a file. Ids from before it was opened are looked up in the file, not kept in memory."""

    def __init__(self, stored: _C.Reader | None, added: dict[str, None]) -> None:
        self._stored = stored
        self._added = added

    def __contains__(self, sequence_id: object) -> bool:
        if not isinstance(sequence_id, str):
            return False
        return sequence_id in self._added or (self._stored is not None and self._stored.find(sequence_id) >= 0)

    def __iter__(self) -> Iterator[str]:
        seen = set()
        for ordinal in range(len(self._stored) if self._stored is not None else 0):
            assert self._stored is not None
            name = self._stored.sequence(ordinal)[0]
            if name not in seen:
                seen.add(name)
                yield name
        yield from (name for name in self._added if name not in seen)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MscanWriter:
    """Appends sequences to a version 2 `.mscan` file.

    Args:
        path: the file; its name ends in `.mscan` by convention.
        metadata: JSON values, written once. With mode "a" it must equal the file's; None uses the file's.
        layout: columns of both planes. With mode "a" it must equal the file's or add entries to it; None uses the file's.
        mode: "x" creates a file that must not exist; "w" replaces one; "a" continues one and drops the remains of an interrupted append.
        codec: "log2u16", 2 bytes per value, or "f32", 4 bytes.
        compression: None or "zstd".
        sync: durability of a finished `append`. "chunk": survives a failure of the machine. "close": survives a failure of the process
            and, once `close` has returned, of the machine. "none": survives a failure of the process; nothing is forced to the disk.

    Raises:
        InputError: an argument is wrong, or metadata or layout do not agree with the file's.
        MscanError: another writer has the file open, it is damaged, or a write failed; earlier sequences stay readable.
        FileExistsError, FileNotFoundError: depending on the mode.

    A writer appends from one thread at a time and releases the GIL meanwhile. docs/mscan.md lists the system calls. As a context
    manager it closes the file, also after an exception.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, Any] | None,
        layout: Sequence[LayoutEntry] | None,
        *,
        mode: str = "x",
        codec: str = "log2u16",
        compression: str | None = None,
        sync: str = "close",
    ) -> None:
        self.path = os.fspath(path)
        _check_text("path", self.path)
        for name, value, choices in (
            ("mode", mode, ("x", "w", "a")),
            ("codec", codec, ("log2u16", "f32")),
            ("sync", sync, ("none", "chunk", "close")),
            ("compression", compression, (None, "zstd")),
        ):
            one_of(*choices)(value, name)
        if mode != "a" and (metadata is None or layout is None):
            raise InputError("metadata and layout must be given unless mode is 'a', got None.")
        if layout is not None:
            check_layout(layout)
        text = _dumps({} if metadata is None else metadata)
        pack = compressor() if compression else None
        self._core = _C.Writer(self.path, mode, text, _rows(layout or ()), codec, sync, pack, decompress)
        try:
            self.metadata = metadata_of(self.path, self._core.metadata)
            self.layout = [LayoutEntry(*row) for row in self._core.layout]
            if metadata is not None:
                _agree(self.metadata, json.loads(text))
            if layout is not None:
                self.extend_layout(layout)
        except BaseException:
            self._core.abandon()
            raise
        self.report = gap_lines(self._core.gaps)
        self._added: dict[str, None] = {}
        stored = _C.Reader(self.path, "tail", decompress) if mode == "a" and len(self._core) else None
        self.sequence_ids: Set[str] = SequenceIds(stored, self._added)
        self._append = self._core.append

    def append(self, record: SequenceRecord) -> int:
        """Appends one sequence and returns its ordinal; on return the sequence is committed, as durable as `sync` defines.

        Raises:
            InputError: shapes do not agree, a norm is negative, a token id does not fit 32 bits, or an id or text is not valid Unicode.
            MscanError: the write failed; the file is unchanged.
        """
        integral = record.integral
        if not isinstance(record.sequence_id, str) or not (record.text is None or isinstance(record.text, str)):
            _check_texts(record)
        try:
            ordinal = self._append(
                record.sequence_id,
                record.token_ids,
                record.loss,
                record.activation,
                record.grad_norm,
                record.mask,
                record.text,
                None if integral is None else integral.planes(),
            )
        except (TypeError, RuntimeError):  # pybind11's error for an invalid text; checked only here, to keep append fast
            _check_texts(record)
            raise
        self._added[record.sequence_id] = None
        return ordinal

    def append_integral(self, integral: Integral) -> None:
        """Stores the total over all sequences; it is valid until another sequence is appended."""
        if not isinstance(integral, Integral):
            raise InputError(f"integral must be an Integral, got {type(integral).__name__}.")
        self._core.append_integral(integral.planes())

    def extend_layout(self, layout: Sequence[LayoutEntry]) -> None:
        """Starts a longer layout; earlier sequences read as missing in the new columns.

        Raises:
            InputError: the layout does not start with the entries of the file's.
        """
        check_layout(layout)
        for ours, theirs in zip(layout, self.layout, strict=False):
            if ours != theirs:
                raise InputError(f"layout must agree with the file's entry {theirs}, got {ours}.")
        if len(layout) < len(self.layout):
            raise InputError(f"layout must hold the file's {len(self.layout)} entries, got {len(layout)}.")
        if len(layout) > len(self.layout):
            self._core.extend_layout(_rows(layout))
            self.layout = list(layout)

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds spent on encoding planes, including checksums, and on writing."""
        return self._core.seconds

    def __len__(self) -> int:
        return len(self._core)

    def close(self) -> None:
        """Writes index and trailer. A second call does nothing.

        Raises:
            MscanError: a write failed; the sequences stay readable.
        """
        self._core.close()

    def __enter__(self) -> MscanWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _rows(layout: Sequence[LayoutEntry]) -> list[tuple[str, int, int, int]]:
    return [(entry.name, entry.out_features, entry.blocks, entry.base) for entry in layout]


def _dumps(metadata: dict[str, Any]) -> str:
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise InputError(f"metadata must be a dict with strings for keys, got {metadata!r:.80}.")
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        text.encode()  # raises for a lone surrogate
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata must be JSON values, got {reason(error)}.") from error


def _check_texts(record: SequenceRecord) -> None:
    _check_text("sequence_id", record.sequence_id)
    if record.text is not None:
        _check_text("text", record.text)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must be valid Unicode, got a lone surrogate at character {error.start}.") from None
    if name == "path" and "\0" in value:
        raise InputError(f"path must not contain a NUL character, got {value!r}.")


def _agree(stored: dict[str, Any], given: dict[str, Any]) -> None:
    for key in {**stored, **given}:
        if key not in stored or key not in given or stored[key] != given[key]:
            raise InputError(f"metadata[{key!r}] must equal the file's {stored.get(key)!r}, got {given.get(key)!r}.")
