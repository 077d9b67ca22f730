"""Records of a text data set: JSON lines, a JSON list or Parquet in; plain text or a chat out."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

# Fields looked for when the caller names none, in this order. The pairs become a chat of two turns.
TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations")
PAIR_FIELDS = (
    (("prompt",), ("completion", "response", "answer", "output")),
    (("instruction", "question"), ("output", "response", "answer", "completion")),
)
# What belongs to an `instruction` or `question`, before it and after it.
ASKED_BEFORE = ("context", "passage")
ASKED_AFTER = ("input", "options")
MAX_ID_BYTES = 65536  # what a .mscan file takes
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class CorpusItem:
    """One sequence to scan.

    Args:
        sequence_id: the record's own `id`, or one made from its content; unique in its corpus.
        text: plain text, or None.
        messages: a chat of `{"role": ..., "content": ...}` turns, or None. Exactly one of the two is given.
    """

    sequence_id: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None

    @property
    def content(self) -> str:
        """All of its text; the turns of a chat are joined by blank lines."""
        if self.text is not None:
            return self.text
        return "\n\n".join(turn["content"] for turn in self.messages or ())


class BadRecordError(InputError):
    """One record breaks a rule; says which, without its place in the file."""


@dataclass(frozen=True)
class Located:
    """A record, or the reason why there is none, with its place.

    Args:
        number: 1-based line, or the record's number in a list or table.
        offset: what `reread` needs to find it again.
        record: the record, or None where it is malformed.
        error: what is malformed.
    """

    number: int
    offset: int
    record: Mapping[str, Any] | None
    error: str | None = None


def open_data(path: str | os.PathLike[str], name: str = "dataset_path") -> BinaryIO:
    """The file, opened for bytes.

    Raises:
        InputError: it is missing, empty, unreadable or no regular file.
    """
    try:
        status = os.stat(path)  # before it is opened: opening a pipe waits for a writer
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name} must be a file, got the folder {os.fspath(path)}; `tinyonn corpus` makes a file of a folder.")
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            found = "an empty file" if stat.S_ISREG(status.st_mode) else "a pipe or device"
            raise InputError(f"{name} must be a file of records, got {found}: {os.fspath(path)}.")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name} must be an existing file, got {os.fspath(path)}.") from None
    except OSError as error:
        raise InputError(f"{name} must be a readable file, got {os.fspath(path)}: {error.strerror}.") from error


def data_kind(path: str | os.PathLike[str], name: str = "dataset_path") -> str:
    """`jsonl`, `list` or `parquet`, by the first bytes, whatever the file is called.

    Raises:
        InputError: the file cannot be read, or is compressed or in another encoding.
    """
    with open_data(path, name) as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")):
        raise InputError(f"{name} must be JSONL, a JSON list or Parquet, got a compressed file: {os.fspath(path)}; unpack it first.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} must be UTF-8, got UTF-16: {os.fspath(path)}.")
    return "list" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "jsonl"


def parse_line(line: bytes, number: int, offset: int) -> Located | None:
    """One line of JSONL; None if it is blank."""
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Located(number, offset, None, f"must be UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return Located(number, offset, None, f"must be one JSON object, got malformed JSON ({error})")
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


def load_list(path: str | os.PathLike[str], name: str = "dataset_path") -> list[Any]:
    """All of a JSON list. It is held whole: JSONL is the format for what does not fit.

    Raises:
        InputError: it is not UTF-8 or not JSON, with the line.
    """
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name} must be UTF-8, got byte 0x{raw[error.start]:02x} in line {line} of {os.fspath(path)}.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} of {os.fspath(path)}"
        raise InputError(f"{name} must be a JSON list, got malformed JSON in {place} ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} must be a JSON list, got malformed JSON in {os.fspath(path)} ({error}).") from None
    return list(values)


def open_parquet(path: str | os.PathLike[str], name: str = "dataset_path") -> Any:
    """A pyarrow ParquetFile.

    Raises:
        InputError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{name} is Parquet, which needs pyarrow: pip install pyarrow. Got {os.fspath(path)}.") from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} must be a whole Parquet file, got {os.fspath(path)}: {reason}") from error


def iter_parquet(table: Any) -> Iterator[Located]:
    """Every row, a batch at a time."""
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for record in batch.to_pylist():
            number += 1
            yield Located(number, number - 1, record)


def item_from_record(record: Mapping[str, Any], *, text_field: str | None = None) -> CorpusItem:
    """Text or chat of one record; its `sequence_id` is the record's `id`, or empty.

    Without `text_field`: `text` or `content` is plain text; `messages` or `conversations` a chat; `prompt` with `completion`, and
    `instruction` or `question` with `output` or `answer`, a chat of two turns, after `system` if that is there. A `context` or `passage`
    goes before the question, `input` or `options` after it.

    Raises:
        BadRecordError: no such field (names the fields there are), an empty text, a malformed chat.
    """
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == ""):
        raise BadRecordError(f"id must be a non-empty string or a whole number, got {_short(identity)}")
    name = "" if identity is None else _sound(str(identity), "id")
    if len(name.encode()) > MAX_ID_BYTES:
        raise BadRecordError(f"id must take at most {MAX_ID_BYTES} bytes, got {len(name.encode())}")
    if text_field is not None:
        if text_field not in record:
            raise BadRecordError(f"must have the field {text_field!r}, its fields are {_names(record)}")
        value = record[text_field]
        if isinstance(value, list):
            return CorpusItem(name, messages=_chat(value, text_field))
        return CorpusItem(name, text=_text(value, text_field))
    for field in TEXT_FIELDS:
        if record.get(field) is not None:
            return CorpusItem(name, text=_text(record[field], field))
    for field in CHAT_FIELDS:
        if record.get(field) is not None:
            return CorpusItem(name, messages=_chat(record[field], field))
    for questions, answers in PAIR_FIELDS:
        question = next((field for field in questions if record.get(field) is not None), None)
        if question is not None:
            return _pair(name, record, question, next((field for field in answers if record.get(field)), None))
    expected = ", ".join((*TEXT_FIELDS, *CHAT_FIELDS, "prompt", "instruction", "question"))
    raise BadRecordError(f"must have one of the fields {expected}, its fields are {_names(record)}")


def content_id(item: CorpusItem, taken: Container[str] = ()) -> str:
    """An identity from the content alone, so that lines added before it do not change it; a repetition gets `-2`, `-3`, ..."""
    raw = item.text if item.messages is None else repr([(turn["role"], turn["content"]) for turn in item.messages])
    name = digest = hashlib.blake2b(str(raw).encode("utf-8"), digest_size=8).hexdigest()
    copies = 1
    while name in taken:
        copies += 1
        name = f"{digest}-{copies}"
    return name


def _pair(name: str, record: Mapping[str, Any], question: str, answer: str | None) -> CorpusItem:
    asked, answered = record[question], None if answer is None else record[answer]
    if isinstance(asked, list):  # prompt and completion may be chats themselves
        turns = [*asked, *answered] if isinstance(answered, list) else asked
        return CorpusItem(name, messages=_chat(turns, question))
    asked = _text(asked, question)
    if question != "prompt":
        parts = [record.get(field) for field in ASKED_BEFORE] + [asked] + [record.get(field) for field in ASKED_AFTER]
        asked = "\n\n".join(_sound(part.strip("\n"), question) for part in parts if isinstance(part, str) and part.strip())
    if answer is None and question == "prompt":  # a bare prompt is text to go on from
        return CorpusItem(name, text=asked)
    turns = [{"role": "user", "content": asked}]
    if isinstance(record.get("system"), str) and record["system"].strip():
        turns.insert(0, {"role": "system", "content": _sound(record["system"], "system")})
    if answer is not None:
        turns.append({"role": "assistant", "content": _text(answered, answer)})
    return CorpusItem(name, messages=turns)


def _chat(value: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{field} must be a non-empty list of turns, got {_short(value)}")
    turns = []
    for index, turn in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(turn, Mapping):
            raise BadRecordError(f"{where} must be an object with role and content, got {_short(turn)}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which the text counts
            content = "".join(part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError(f"{where} must have role and content as text, its fields are {_names(turn)}")
        turns.append({"role": ROLES.get(role, role), "content": _sound(content, where)})
    if not any(turn["content"].strip() for turn in turns):
        raise BadRecordError(f"{field} must hold some text, got only empty turns")
    return turns


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{field} must be text, got {_short(value)}")
    if not value.strip():
        raise BadRecordError(f"{field} must not be empty")
    return _sound(value, field)


def _sound(value: str, field: str) -> str:
    # JSON may spell half of a surrogate pair; no tokenizer and no file takes it.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(f"{field} must be valid Unicode, got a lone surrogate at character {error.start}") from None
    return value


def _names(record: Mapping[str, Any]) -> str:
    names = [str(key) for key in record]
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:12])
    return (shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more") or "none"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
