"""A corpus to scan. Every record is checked once, then read from the file on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..._io.folders import file_hash
from ..._io.options import integer
from ..._io.records import (
    BadRecordError,
    Located,
    as_record,
    content_kind,
    iter_jsonl,
    iter_list,
    iter_parquet,
    load_list,
    open_parquet,
    parse_line,
)
from ..._io.streams import is_stdin, open_content, open_data, place
from ...errors import InputError
from .build import CorpusProgress, CorpusReport, build_corpus
from .records import CorpusItem, content_id, item_from_record

__all__ = ["Corpus", "CorpusItem", "CorpusProgress", "CorpusReport", "build_corpus", "read_corpus"]

_OPTION = "dataset_path"  # the option that messages name


class Corpus:
    """The sequences of one data set, in file order: `len`, iteration, `corpus[i]`.

    Memory holds only the place and identity of each record (about 100 bytes); the text is read again on demand. Compressed lines and those
    of standard input are copied to a temporary file while they are checked, no further than `limit` needs.

    Args:
        path: path of the file; "-" for standard input.
        text_field: field with the text, or None.

    Attributes:
        kind: "jsonl", "list" or "parquet".
        skipped: number of malformed records that were skipped (`skip_bad`).
        errors: messages of the first few of them, with their lines.
    """

    def __init__(self, path: Path, text_field: str | None) -> None:
        self.path = path
        self.text_field = text_field
        self.skipped = 0
        self.errors: list[str] = []
        self._numbers = array("Q")
        self._offsets = array("Q")
        self._ids: list[str] = []
        self._content = open_content(path, _OPTION)
        self.kind = content_kind(self._content, path, _OPTION)
        self._values: list[Any] = load_list(self._content, path, _OPTION) if self.kind == "list" else []
        self._kept: BinaryIO | None = None
        if self.kind == "jsonl" and not self._content.plain:
            # Open as long as the corpus is used.
            self._kept = cast(BinaryIO, tempfile.TemporaryFile(prefix="tinyonn-corpus-"))  # noqa: SIM115
        elif self.kind == "parquet":
            self._content.file.close()

    @property
    def sequence_ids(self) -> list[str]:
        """The identity of every sequence, in order."""
        return list(self._ids)

    def content_hash(self) -> str:
        """SHA-256 of the data set in hexadecimal: of the file's name and content, or of the records used from standard input."""
        if not is_stdin(self.path):
            return file_hash(self.path)
        digest = hashlib.sha256()
        for item in self:
            digest.update(json.dumps([item.sequence_id, item.text, item.messages, item.tools], ensure_ascii=False).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[CorpusItem]:
        if self.kind == "jsonl":
            with self._lines() as file:
                for index in range(len(self)):
                    yield self._item(index, self._line_of(file, index))
        elif self.kind == "list":
            yield from map(self.__getitem__, range(len(self)))
        else:
            index = 0
            for located in iter_parquet(self.path, _OPTION):
                if index == len(self):
                    return
                if located.number == self._numbers[index]:
                    yield self._item(index, located)
                    index += 1

    def __getitem__(self, index: int) -> CorpusItem:
        index = range(len(self))[index]
        number, offset = self._numbers[index], self._offsets[index]
        if self.kind == "jsonl":
            with self._lines() as file:
                return self._item(index, self._line_of(file, index))
        if self.kind == "list":
            return self._item(index, as_record(self._values[offset], number, offset))
        return self._item(index, Located(number, offset, _parquet_row(self.path, offset)))

    def _lines(self) -> AbstractContextManager[BinaryIO]:
        return open_data(self.path, _OPTION) if self._kept is None else nullcontext(self._kept)

    def _line_of(self, file: BinaryIO, index: int) -> Located | None:
        file.seek(self._offsets[index])
        return parse_line(file.readline(), self._numbers[index], self._offsets[index])

    def _item(self, index: int, located: Located | None) -> CorpusItem:
        try:
            if located is None or located.record is None:
                raise BadRecordError("is not the record it was")
            item = item_from_record(located.record, text_field=self.text_field)
        except BadRecordError as error:
            raise InputError(f"{place(self.path)} changed while it was read: {self._place(self._numbers[index])} {error}.") from None
        return dataclasses.replace(item, sequence_id=self._ids[index])

    def _place(self, number: int) -> str:
        return f"line {number}" if self.kind == "jsonl" else f"record {number}"

    def _located(self) -> Iterator[Located]:
        if self.kind == "list":
            yield from iter_list(self._values)
        elif self.kind == "parquet":
            yield from iter_parquet(self.path, _OPTION)
        else:
            with self._content.file as file:
                yield from iter_jsonl(file if self._kept is None else _copied(file, self._kept))

    def index(self, *, limit: int | None = None, skip_bad: bool = False) -> None:
        """Checks records up to `limit` good ones and notes their places.

        Raises:
            InputError: a malformed record, or an id seen before, unless `skip_bad`.
        """
        seen: dict[str, int] = {}
        for located in self._located():
            if limit is not None and len(self._ids) >= limit:
                return
            try:
                if located.record is None:
                    raise BadRecordError(located.error)
                item = item_from_record(located.record, text_field=self.text_field)
                if item.sequence_id in seen:
                    raise BadRecordError(
                        f"must have an id of its own, got {item.sequence_id!r}, which {self._place(seen[item.sequence_id])} has too"
                    )
            except BadRecordError as error:
                message = f"{place(self.path)}, {self._place(located.number)}: {error}"
                if not skip_bad:
                    raise InputError(f"{message}.") from None
                self.skipped += 1
                if len(self.errors) < 5:
                    self.errors.append(message)
                continue
            name = item.sequence_id or content_id(item, seen)
            seen[name] = located.number
            self._ids.append(name)
            self._numbers.append(located.number)
            self._offsets.append(located.offset)


def read_corpus(
    path: str | os.PathLike[str],
    *,
    text_field: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Corpus:
    """Checks a data set and returns its sequences.

    The content determines the format: JSON lines or a JSON list, compressed or not (gzip, bzip2, xz; zstd with zstandard), or Parquet
    (with pyarrow). A record is plain text, a chat, or a pair of prompt and answer (`records.item_from_record`). All records up to `limit`
    are checked here, before any is scanned.

    Args:
        path: path of the file; "-" for standard input, which is read once.
        text_field: field with the text or the chat; None to detect it.
        limit: largest number of sequences; the rest of the file is not read.
        skip_bad: whether to count malformed records in `.skipped` and continue.

    Raises:
        InputError: the file is missing, empty or not UTF-8; a line is malformed or lacks the field (the message has line and fields); two
            records have the same id.
    """
    if limit is not None:
        integer(1)(limit, "limit")
    if not is_stdin(path) and os.path.isdir(path):
        raise InputError(f"{_OPTION} must be a file, got the folder {os.fspath(path)}; `tinyonn corpus` makes a file of a folder.")
    corpus = Corpus(Path(path), text_field)
    corpus.index(limit=limit, skip_bad=skip_bad)
    if not len(corpus):
        found = f"{corpus.skipped} malformed ones" if corpus.skipped else "none"
        first = f" ({corpus.errors[0]})" if corpus.errors else ""
        raise InputError(f"{_OPTION} must hold at least one good record, got {found} in {place(corpus.path)}{first}.")
    return corpus


def _parquet_row(path: Path, row: int) -> dict[str, Any]:
    table = open_parquet(path, _OPTION)
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row < rows:
            return dict(table.read_row_group(group).slice(row, 1).to_pylist()[0])
        row -= rows
    raise BadRecordError("is no longer there")


def _copied(file: BinaryIO, copy: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each after it was copied."""
    for line in file:
        try:
            copy.write(line)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise InputError(f"{_OPTION} must fit unpacked into {folder} (TMPDIR names another folder): {error.strerror}.") from error
        yield line
