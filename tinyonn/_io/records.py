"""Records of a data set in JSON lines, a JSON list or Parquet, each with its position and its fault, if any."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InputError, needs, reason, shown
from .streams import Content, open_content, place


class BadRecordError(InputError):
    """A record breaks a rule. The message names the rule, not the record's position in the file."""


@dataclass(frozen=True)
class Located:
    """A record, or the fault of a malformed one, with its position.

    Args:
        number: line number, or number of the record in a list or table; from 1.
        offset: position of the record: its first byte in JSONL, its index in a list or table.
        record: the record; None if it is malformed.
        error: fault of a malformed record.
    """

    number: int
    offset: int
    record: Mapping[str, Any] | None
    error: str | None = None


class Records(NamedTuple):
    """Records of a file.

    Attributes:
        unit: unit of `Located.number`: "line" or "record".
        extent: upper bound of `Located.offset`, at least 1: bytes of JSONL, records of a list or table. None if unknown (JSONL that is
            compressed or on standard input).
        located: iterator over all records in order, which are read lazily.
    """

    unit: str
    extent: int | None
    located: Iterator[Located]


def open_records(path: str | os.PathLike[str], name: str = "data_path") -> Records:
    """Records of JSONL, a JSON list or Parquet; the first bytes determine the format.

    Args:
        path: file with the records.
        name: name of the option that holds the path, for messages.

    Raises:
        InputError: the file is missing, empty, damaged, malformed or not UTF-8, or pyarrow is not installed for Parquet.
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
    """All records of a file, malformed ones included: `open_records(path, name).located`."""
    return open_records(path, name).located


def _lines(content: Content) -> Iterator[Located]:
    with content.file as file:
        yield from iter_jsonl(file)


def data_kind(path: str | os.PathLike[str], name: str = "data_path") -> str:
    """Format of a data set: `jsonl`, `list` or `parquet`. The first bytes of the uncompressed content determine it, not the file's name.

    Raises:
        InputError: the file cannot be read, or its kind is not supported (see `open_content`).
    """
    content = open_content(path, name)
    with content.file:
        return content_kind(content, path, name)


def content_kind(content: Content, path: str | os.PathLike[str], name: str = "data_path") -> str:
    """Format of opened content, as for `data_kind`.

    Raises:
        InputError: Parquet is compressed as a whole, or on standard input.
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
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))  # so that the error of an incomplete line has the right column
    except UnicodeDecodeError as error:
        return Located(number, offset, None, f"must be UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or nesting that is too deep
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({reason(error, 80)})")
    return as_record(record, number, offset)


def as_record(record: Any, number: int, offset: int) -> Located:
    """A parsed value with its position; any value but an object is malformed."""
    if isinstance(record, Mapping):
        return Located(number, offset, record)
    kind = {str: "a string", list: "a list", bool: "a truth value", type(None): "null"}.get(type(record), "a number")
    return Located(number, offset, None, f"must be one JSON object, got {kind}")


def iter_jsonl(file: Iterable[bytes]) -> Iterator[Located]:
    """All lines that are not blank, malformed ones included."""
    offset = 0
    for number, line in enumerate(file, start=1):
        located = parse_line(line, number, offset)
        offset += len(line)
        if located is not None:
            yield located


def load_list(content: Content, path: str | os.PathLike[str], name: str = "data_path") -> list[Any]:
    """Values of a JSON list, all in memory. For larger data, use JSONL.

    Raises:
        InputError: the content is not UTF-8 or not JSON; the message has the line.
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
    """All values of a list; those that are not objects are malformed."""
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
    """All rows, read in batches.

    Raises:
        InputError: as for `open_parquet`, or a page is damaged.
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
    """Field names of a record for a message: at most twelve, each of at most 40 characters."""
    names = [str(key) for key in record]
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:12])
    return (shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more") or "none"


def is_no_label(value: Any) -> bool:
    """Whether a label is a placeholder for a missing one: null, NaN, blank, "-" or -1."""
    if isinstance(value, float):
        return math.isnan(value) or value == -1
    return value is None or (not isinstance(value, bool) and str(value).strip() in ("", "-", "-1"))


def whole(value: Any) -> Any:
    """A label such as 1.0 as a whole number (pandas writes a column with gaps so); other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_number(value: Any) -> float | None:
    """Number of a label, however it is written: 1, "1", "01" and "1.0" are equal; None if it is not a number."""
    found = isinstance(value, str | int | float) and re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9})?", str(value).strip(), re.ASCII)
    return float(found[0]) if found else None


def short(value: Any) -> str:
    """A value with its type for a message, in at most 60 characters."""
    return f"{type(value).__name__} {shown(value)}"
