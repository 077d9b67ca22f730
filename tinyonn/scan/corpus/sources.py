"""Large sources that a corpus is cut from: record files, text files, folders of both, data sets on the hub."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..._io.records import Located, as_record, content_kind, iter_jsonl, iter_list, load_list, open_records
from ..._io.streams import STDIN, ForeignFileError, is_stdin, open_content, own_suffix, place
from ...errors import InputError, needs, reason

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# A folder also holds what no one means by a corpus: a .json there is a configuration.
FOLDER_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
# Third-party packages inside a tree are skipped; to read such a folder, name it.
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "site-packages", "dist-packages")
MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class SourceRecord:
    """One record of a source.

    Args:
        place: file (relative to a folder source) and line or record number, for messages.
        located: the record, or the reason why there is none; the text of a text file is `{"text": ...}`.
        file_name: name of a text file; None for records of a table.
        fraction: fraction of the source read so far; None if its size is unknown.
        foreign: kind and remedy of a file in a known format that is not read; None for all others.
    """

    place: str
    located: Located
    file_name: str | None = None
    fraction: float | None = None
    foreign: str | None = None


def iter_source(source: str, *, subset: str | None = None, split: str = "train") -> Iterator[SourceRecord]:
    """Every record of a source, streamed.

    Args:
        source: a JSONL, JSON or Parquet file, a text file, compressed or not, a folder, "-" for standard input, or the name of a data set
            on the hub.
        subset: configuration of a hub data set.
        split: split of a hub data set.

    Raises:
        InputError: the source does not exist, or cannot be read.
    """
    require_source(source)
    path = Path(source)
    kind = "standard input" if is_stdin(source) else "a folder" if path.is_dir() else "a file" if path.exists() else ""
    if kind and subset is not None:
        raise InputError(f"subset must be left out for {kind}, got {subset!r}.")
    if kind == "standard input":
        yield from _standard_input()
    elif kind == "a folder":
        yield from _folder(path)
    elif kind:
        yield from _records(path, str(path)) if holds_records(path) else _text_file(path, str(path))
    else:
        yield from _hub(source, subset, split)


def require_source(source: str) -> None:
    """Raises InputError unless this is a file, a folder or a possible name on the hub."""
    if not is_stdin(source) and not Path(source).exists() and not is_hub_name(source):
        raise InputError(f"source must be an existing file or folder, or the name of a data set on the hub, got {source}.")


def is_hub_name(source: str) -> bool:
    """Whether this could be `name` or `owner/name` on the hub, rather than a mistyped path."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", source)) and not re.search(r"\.[A-Za-z]{1,8}$", source)


def holds_records(path: Path) -> bool:
    """Whether a file is a table of records rather than a text, by its suffix or its first bytes."""
    if own_suffix(path.name) in RECORD_SUFFIXES:
        return True
    content = open_content(path, "source")
    with content.file:
        return content.head.startswith(b"PAR1") or (own_suffix(path.name) == "" and _starts_with(content.head, b"{"))


def _starts_with(head: bytes, sign: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(sign)


def _records(path: Path, shown: str, done: float = 0.0, share: float = 1.0) -> Iterator[SourceRecord]:
    unit, extent, records = open_records(path, "source")
    for located in records:
        fraction = None if extent is None else done + share * located.offset / extent
        yield SourceRecord(f"{shown}, {unit} {located.number}", located, None, fraction)


def _standard_input() -> Iterator[SourceRecord]:
    """Records where it begins as JSON does, else one text."""
    content, shown = open_content(STDIN, "source"), place(STDIN)
    kind = content_kind(content, STDIN, "source")
    if kind == "list" or _starts_with(content.head, b"{"):
        located = iter_list(load_list(content, STDIN, "source")) if kind == "list" else iter_jsonl(content.file)
        for record in located:
            yield SourceRecord(f"{shown}, {'record' if kind == 'list' else 'line'} {record.number}", record)
    else:
        yield SourceRecord(shown, _text(content.file.read(MAX_TEXT_BYTES + 1)), shown)


def _text_file(path: Path, shown: str, fraction: float = 0.0) -> Iterator[SourceRecord]:
    foreign = None
    try:
        content = open_content(path, "source")
        with content.file as file:
            located = _text(file.read(MAX_TEXT_BYTES + 1))
    except ForeignFileError as error:
        located, foreign = Located(1, 0, None, str(error).rstrip(".")), f"{error.kind}; {error.remedy}"
    except InputError as error:  # an empty file, a damaged archive
        located = Located(1, 0, None, "text must not be empty" if path.is_file() and path.stat().st_size == 0 else str(error).rstrip("."))
    except OSError as error:
        located = Located(1, 0, None, f"must be readable: {error.strerror}")
    yield SourceRecord(shown, located, path.name, fraction, foreign)


def _text(raw: bytes) -> Located:
    """A text file's bytes as one record."""
    if len(raw) > MAX_TEXT_BYTES:
        return Located(1, 0, None, f"must be a text of at most {MAX_TEXT_BYTES >> 20} MiB")
    try:
        # Line ends are unified, so that the same text in two files compares equal.
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return Located(1, 0, None, f"must be UTF-8, got byte 0x{error.object[error.start]:02x} in line {line}")
    return Located(1, 0, None, "must be text, got bytes of zero") if "\0" in text else Located(1, 0, {"text": text})


def _folder(root: Path) -> Iterator[SourceRecord]:
    # Sorted, so that the same folder gives the same corpus everywhere. Links are skipped, because they may form circles.
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        paths = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
        files += [path for path in paths if path.is_file() and not path.is_symlink()]
    if not files:
        raise InputError(f"source must hold files, got the folder {root} without any.")
    for index, path in enumerate(files):
        shown, done = str(path.relative_to(root)), index / len(files)
        if own_suffix(path.name) in FOLDER_RECORD_SUFFIXES and path.stat().st_size:
            yield from _records(path, shown, done, 1 / len(files))
        else:
            yield from _text_file(path, shown, done)


def _hub(name: str, subset: str | None, split: str) -> Iterator[SourceRecord]:
    missing = f"source must be an existing file or folder, or a data set on the hub, got {name}: there is no such file, and"
    try:
        import datasets
    except ImportError:
        raise InputError(f"{needs(f'{missing} the hub', 'datasets')}.") from None
    if not _online():
        raise InputError(f"{missing} the hub cannot be reached.")
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        for index, record in enumerate(rows):
            yield SourceRecord(f"{name}, record {index + 1}", as_record(record, index + 1, index))
    except (OSError, ValueError) as error:  # what the library raises for names, subsets, splits and lost connections
        if isinstance(error, InputError):
            raise
        raise InputError(f"{missing} the hub says: {reason(error)}") from error


def _online() -> bool:
    # Without this, a mistyped path waits half a minute for the hub client's retries.
    if any(
        os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # a cached copy, or a proxy that resolves names for us
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
