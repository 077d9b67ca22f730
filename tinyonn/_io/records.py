"""Records of a data set: JSON lines, a JSON list or Parquet, each with its place and what is malformed in it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ..errors import InputError, needs, reason, shown
from .streams import Content, open_content, place


class BadRecordError(InputError):
    """One record breaks a rule; says which, without its place in the file."""


@dataclass(frozen=True)
class Located:
    """A record, or the reason why there is none, with its place.

    Args:
        number: 1-based line, or the record's number in a list or table.
        offset: where it is found again: its first byte in JSONL, its index in a list or table.
        record: the record, or None where it is malformed.
        error: what is malformed.
    """

    number: int
    offset: int
    record: Mapping[str, Any] | None
    error: str | None = None


class Records(NamedTuple):
    """What a file holds.

    Attributes:
        unit: what a record's number counts: "line" or "record".
        extent: what offsets run up to: bytes of JSONL, records of a list or table; at least 1. None where it is not known, of JSONL that
            is compressed or on standard input.
        located: every record in order, read as it is asked for.
    """

    unit: str
    extent: int | None
    located: Iterator[Located]


def open_records(path: str | os.PathLike[str], name: str = "data_path") -> Records:
    """The records of JSONL, a JSON list or Parquet, told apart by their first bytes.

    Args:
        path: the file.
        name: of the option that gave it, for messages.

    Raises:
        InputError: no file, an empty one, a damaged archive, no UTF-8, a malformed list, a damaged table, or pyarrow is missing for one.
    """
    content = open_content(path, name)
    kind = content_kind(content, path, name)
    if kind == "jsonl":
        return Records("line", max(os.stat(path).st_size, 1) if content.plain else None, _lines(content))
    if kind == "list":
        values = load_list(content, path, name)
        return Records("record", max(len(values), 1), iter_list(values))
    content.file.close()
    return Records("record", max(open_parquet(path, name).metadata.num_rows, 1), iter_parquet(path, name))


def read_records(path: str | os.PathLike[str], name: str = "data_path") -> Iterator[Located]:
    """Every record of a file, well formed or not: `open_records(path, name).located`."""
    return open_records(path, name).located


def _lines(content: Content) -> Iterator[Located]:
    with content.file as file:
        yield from iter_jsonl(file)


def data_kind(path: str | os.PathLike[str], name: str = "data_path") -> str:
    """`jsonl`, `list` or `parquet`, by the first bytes, whatever the file is called; compressed files by those of their content.

    Raises:
        InputError: the file cannot be read, or is of a kind that is not read (see `open_content`).
    """
    content = open_content(path, name)
    with content.file:
        return content_kind(content, path, name)


def content_kind(content: Content, path: str | os.PathLike[str], name: str = "data_path") -> str:
    """The same of content that is open.

    Raises:
        InputError: Parquet that is compressed once more, or on standard input.
    """
    head = content.head
    if head.startswith(b"PAR1"):
        if not content.plain:
            raise InputError(f"{name} must be a plain file where it is Parquet, which is compressed inside, got {place(path)}.")
        return "parquet"
    return "list" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "jsonl"


def parse_line(line: bytes, number: int, offset: int) -> Located | None:
    """One line of JSONL; None if it is blank."""
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))  # a line that ends too early is told with its own column
    except UnicodeDecodeError as error:
        return Located(number, offset, None, f"must be UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({reason(error, 80)})")
    return as_record(record, number, offset)


def as_record(record: Any, number: int, offset: int) -> Located:
    """A parsed value with its place; anything but an object is malformed."""
    if isinstance(record, Mapping):
        return Located(number, offset, record)
    kind = {str: "a string", list: "a list", bool: "a truth value", type(None): "null"}.get(type(record), "a number")
    return Located(number, offset, None, f"must be one JSON object, got {kind}")


def iter_jsonl(file: BinaryIO) -> Iterator[Located]:
    """Every line that is not blank, well formed or not."""
    offset = 0
    for number, line in enumerate(file, start=1):
        located = parse_line(line, number, offset)
        offset += len(line)
        if located is not None:
            yield located


def load_list(content: Content, path: str | os.PathLike[str], name: str = "data_path") -> list[Any]:
    """All of a JSON list. It is held whole: JSONL is the format for what does not fit.

    Raises:
        InputError: it is not UTF-8 or not JSON, with the line.
    """
    with content.file as file:
        raw = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name} must be UTF-8, got byte 0x{raw[error.start]:02x} in line {line} of {place(path)}.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} of {place(path)}"
        raise InputError(f"{name} must be a JSON list, got malformed JSON in {where} ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} must be a JSON list, got malformed JSON in {place(path)} ({reason(error, 80)}).") from None
    return list(values)


def iter_list(values: Iterable[Any]) -> Iterator[Located]:
    """Every value of a list, an object or not."""
    for index, value in enumerate(values):
        yield as_record(value, index + 1, index)


def open_parquet(path: str | os.PathLike[str], name: str = "data_path") -> Any:
    """A pyarrow ParquetFile.

    Raises:
        InputError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{needs(f'{name} is Parquet, which', 'pyarrow')}. Got {os.fspath(path)}.") from None
    with _whole_table(path, name):
        return pq.ParquetFile(path)


def iter_parquet(path: str | os.PathLike[str], name: str = "data_path") -> Iterator[Located]:
    """Every row, a batch at a time.

    Raises:
        InputError: as `open_parquet`, or a page is damaged.
    """
    table, number = open_parquet(path, name), 0
    with _whole_table(path, name):
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield Located(number, number - 1, record)


@contextmanager
def _whole_table(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} must be a whole Parquet file, got {os.fspath(path)}: {reason(error, 100)}") from error


def field_names(record: Mapping[str, Any]) -> str:
    """The fields of a record, for a message: twelve at most, none longer than 40 characters."""
    names = [str(key) for key in record]
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:12])
    return (shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more") or "none"


def is_no_label(value: Any) -> bool:
    """Whether a label stands for none: null, NaN, blank, "-" or -1, as data sets write where annotators disagree or keep labels back."""
    if isinstance(value, float):
        return math.isnan(value) or value == -1
    return value is None or (not isinstance(value, bool) and str(value).strip() in ("", "-", "-1"))


def whole(value: Any) -> Any:
    """A label as a whole number where it is one written as 1.0, which is what pandas makes of a column with gaps; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_number(value: Any) -> float | None:
    """The number that a label is, however it is written: 1, "1", "01" and "1.0" are the same; None for what is none."""
    found = isinstance(value, str | int | float) and re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9})?", str(value).strip(), re.ASCII)
    return float(found[0]) if found else None


def short(value: Any) -> str:
    """A value and its type in one line of a message, 60 characters at most."""
    return f"{type(value).__name__} {shown(value)}"
