"""Records of an evaluation in a file of JSON lines, so that one that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, listed, shown
from .tasks import Task


class Records:
    """Records by task. The file's first line has the model and the options that all of them come from; each next line is a task.

    A line that was cut off is dropped. Records of other tasks stay, so that an evaluation may begin with few tasks and go on with more.

    Args:
        path: the file; None to keep records in memory alone.
        identity: what the records come from.

    Raises:
        InputError: the file is of another identity, is no file of records, or cannot be written.
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
            rows = [json.loads(line) for line in lines]
            stored = dict(rows[0]["identity"]) if rows else identity
            self._found = {(row["task"], row["digest"]): row for row in rows[1:]}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path} must be the predictions of an evaluation, got another file; move it, or give another folder."
            ) from None
        odd = [name for name in identity if stored.get(name) != identity[name]]
        if odd:
            what = listed(f"{name} {shown(stored.get(name), 24)}, now {shown(identity[name], 24)}" for name in odd)
            raise InputError(f"{path} must be of the same model and options to go on, got {what}; delete it, or give another folder.")
        return sum(len(line) + 1 for line in lines)

    def get(self, task: Task) -> dict[str, Any] | None:
        """The record of a task; None if there is none."""
        return self._found.get((task.name, task.digest))

    def add(self, task: Task, record: dict[str, Any]) -> None:
        """Adds the record of a task, and writes it at once."""
        self._found[task.name, task.digest] = record
        self._write(record)

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
