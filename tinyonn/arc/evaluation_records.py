"""Records of an evaluation in a file of JSON lines, so that one that was stopped goes on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, listed, shown
from .tasks import Task

BEGIN = b'{"identity":'  # of the file


class Records:
    """Records by task. The file's first line has the model and the options that all of them come from; each next line is a task.

    A line that was cut off is dropped. Each record has the CRC-32 of its other fields, `crc`, which those of earlier versions lack.
    Records of other tasks stay, so that an evaluation may begin with few tasks and go on with more.

    Args:
        path: the file; None to keep records in memory alone.
        identity: what the records come from.

    Raises:
        InputError: the file is of another identity, has a damaged line, is no file of records, or cannot be written.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self._file: Any = None
        if path is None:
            return
        try:
            whole = self._read(path, identity)
            self._file = path.open("r+b" if path.exists() else "wb")
            self._file.truncate(whole)
            self._file.seek(whole)
        except OSError as error:
            raise InputError(f"{path} must be a file that can be written: {error.strerror}.") from None
        if not whole:
            self._write({"identity": dict(identity)})

    def _read(self, path: Path, identity: Mapping[str, Any]) -> int:
        """Reads the file. Returns the bytes of its whole lines."""
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]
        try:
            stored = dict(json.loads(lines[0])["identity"]) if lines else identity
        except (ValueError, KeyError, TypeError, RecursionError):
            stored = None
        if stored is None or not content.startswith(BEGIN[: len(content)]):
            raise InputError(f"{path} must be the predictions of an evaluation, got another file; move it, or give another folder.")
        odd = [name for name in identity if stored.get(name) != identity[name]]
        if odd:
            what = listed(f"{name} {shown(stored.get(name), 24)}, now {shown(identity[name], 24)}" for name in odd)
            raise InputError(f"{path} must be of the same model and options to go on, got {what}; delete it, or give another folder.")
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                whole = row.pop("crc", None) in (None, _checksum(row))
                self._found[row["task"], row["digest"]] = row
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                whole = False
            if not whole:
                raise InputError(f"{path} must have whole lines, got a damaged line {number}; delete it, and its task is evaluated again.")
        return sum(len(line) + 1 for line in lines)

    def get(self, task: Task) -> dict[str, Any] | None:
        """The record of a task; None if there is none."""
        return self._found.get((task.name, task.digest))

    def add(self, task: Task, record: dict[str, Any]) -> None:
        """Adds the record of a task, and writes it at once."""
        self._found[task.name, task.digest] = record
        self._write({**record, "crc": _checksum(record)})

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_line(value) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(_line(record)):08x}"
