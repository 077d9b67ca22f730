"""Files that one step of the head laboratory writes and later steps and pages read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .._io.records import short
from ..errors import InputError, reason

# Kind of a field in a record -> its check.
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
    """A file that a later step reads is missing or invalid.

    Args:
        path: path of the file.
        said: rule and finding, which follow "must" in the message.
        step: command that writes the file.
        again: whether the message says "again" after the command.
    """

    def __init__(self, path: Path, said: str, step: str, *, again: bool = False) -> None:
        super().__init__(f"{path} must {said}; run {step}{' again' if again else ''}.")
        self.found = f"{path.name} must {said}"
        self.step = step


def json_text(value: object) -> str:
    """JSON in the format of these files; NaN is an error."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def csv_text(columns: Mapping[str, Iterable[object]]) -> str:
    """CSV of named columns of the same length; numbers have 9 digits, texts are written as they are."""
    rows = ([cell if isinstance(cell, str) else f"{cell:.9g}" for cell in row] for row in zip(*columns.values(), strict=True))
    return "".join(f"{','.join(row)}\n" for row in (columns, *rows))


def read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]], step: str, again: str | None = None) -> Any:
    """Content of a JSON file that a command wrote.

    Args:
        path: path of the file.
        kind: expected type, dict or list.
        step: command that writes the file.
        again: command that replaces a damaged file; None for `step`.

    Raises:
        StepFileError: the file is missing or invalid; the message names the file and the command.
        InputError: the file cannot be read.
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
    """Content of a JSON object that a command wrote, with checked fields.

    Args:
        path, step, again: as for `read_json`.
        fields: name -> kind, such as "text", "a number" or "a whole number" (see `_KINDS`).

    Raises:
        InputError: as for `read_json`, or a field is missing or of another kind.
    """
    record: dict[str, Any] = read_json(path, dict, step, again)
    check_fields(path, record, fields, again or step, again=again is None)
    return record


def check_fields(path: Path, record: Mapping[str, Any], fields: Mapping[str, str], step: str, *, again: bool = False) -> None:
    """Raises StepFileError for a record without these fields; the message names `path`."""
    for name, kind in fields.items():
        if name not in record or not _KINDS[kind](record[name]):
            got = short(record[name]) if name in record else "none"
            raise StepFileError(path, f"have {kind} as {name}, got {got}", step, again=again)


def is_finite(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # whole numbers are unbounded
        return False
