"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, reason
from .records import short

# What a field of a record may be -> its check.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "text or null": lambda value: value is None or isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
    "an object": lambda value: isinstance(value, dict),
    "a number": lambda value: is_finite(value),
    "a number or null": lambda value: value is None or is_finite(value),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool) and is_finite(value),
}


class StepFileError(InputError):
    """A file between two steps that is missing, or not what its step writes.

    Args:
        path: the file.
        said: after "must": what it must be, and what was found.
        step: command that writes it.
        again: whether the command is said to be run again.
    """

    def __init__(self, path: Path, said: str, step: str, *, again: bool = False) -> None:
        super().__init__(f"{path} must {said}; run {step}{' again' if again else ''}.")
        self.found = f"{path.name} must {said}"
        self.step = step


def write_atomically(path: Path, content: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never half.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8", errors="replace")


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]], step: str, again: str | None = None) -> Any:
    """JSON that a command wrote.

    Args:
        path: the file.
        kind: dict or list, what it must be.
        step: command that writes it.
        again: command that writes it where a damaged one is there; None for `step`.

    Raises:
        StepFileError: it is missing or something else; the line names the file and the command.
        InputError: it cannot be read.
    """
    repeat, once_more = again or step, again is None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StepFileError(path, "exist, got no such file", step) from None
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise StepFileError(path, f"be valid JSON, got: {reason(error, 100)}", repeat, again=once_more) from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise StepFileError(path, f"be a JSON {wanted}, got {type(value).__name__}", repeat, again=once_more)
    return value


def read_record(path: Path, fields: Mapping[str, str], step: str, again: str | None = None) -> dict[str, Any]:
    """A JSON object that a command wrote, with the fields that later steps read.

    Args:
        path, step, again: as for `read_json`.
        fields: name -> what it must be, a key of the table above: "text", "a number", "a whole number", ...

    Raises:
        InputError: as `read_json`, or a field is missing or something else.
    """
    record: dict[str, Any] = read_json(path, dict, step, again)
    check_fields(path, record, fields, again or step, again=again is None)
    return record


def check_fields(path: Path, record: Mapping[str, Any], fields: Mapping[str, str], step: str, *, again: bool = False) -> None:
    """Refuses a record without these fields; `path` is the file that it is in, for the message."""
    for name, kind in fields.items():
        if name not in record or not _KINDS[kind](record[name]):
            got = short(record[name]) if name in record else "none"
            raise StepFileError(path, f"have {kind} as {name}, got {got}", step, again=again)


def is_finite(value: object) -> bool:
    """Whether a JSON value is a number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # whole numbers have no end
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; the file is not held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class replacing:
    """A context that gives a temporary path beside `path` and renames it on success."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", suffix=self._path.suffix, dir=self._path.parent)
        except OSError as error:
            raise InputError(f"output must be in a folder that can be written, got {self._path}: {error.strerror}.") from error
        os.close(handle)
        self._partial = Path(name)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            if isinstance(value, OSError):  # a write that failed names no file
                raise InputError(f"output must be where there is room to write, got {self._path}: {value.strerror or value}.") from value
            return
        mask = os.umask(0)
        os.umask(mask)
        self._partial.chmod(0o666 & ~mask)  # mkstemp's 0600 would hide the file from others
        try:
            os.replace(self._partial, self._path)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise InputError(f"output must be a file that can be written, got {self._path}: {error.strerror}.") from error
