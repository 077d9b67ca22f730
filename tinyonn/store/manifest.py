"""The manifest: one small file that says what a store holds, and is replaced atomically after each save.

    manifest.json            a line of JSON, and a line with its checksum
    manifest.previous.json   the one before, in case that a disk damages the newest
    index/                   layouts, tables and records of past steps, lists of closed chapters; each file is written once
    segments/                the chunks

A store is a chain of segments. The chain is cut into chapters of at most `CHAPTER` steps. A chapter has a table of where each chunk was
before its first step, its base; the headers of its segments say what changed since. When it ends, these changes are gathered in one file,
its records. So opening a store reads one table and at most `CHAPTER` headers, however many steps lie before.

Closed chapters are listed in volumes, files in index/. A new volume takes in those before it that are not longer, so n chapters have at
most log2(n) + 1 volumes, and the manifest stays small.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._io.files import sync
from .errors import DamagedStoreError, StoreError
from .keep import from_ranges, to_ranges
from .layout import PLACE, Digest, Layout, digest, from_hex, hex_digest

FORMAT = 2
READABLE = (1, 2)  # in 1, the manifest has the closed chapters itself
CHAPTER = 64
NAME, PREVIOUS = "manifest.json", "manifest.previous.json"
INDEX, SEGMENTS = "index", "segments"

RECORD = np.dtype([*((name, PLACE[name]) for name in ("file", "offset", "size", "digest")), ("chunk", "<i8"), ("step", "<i8")])
FILE = np.dtype([("file", "<i8"), ("size", "<i8"), ("digest", "<u8", (2,))])


@dataclass(frozen=True)
class IndexFile:
    """A file in index/, and its checksum."""

    name: str
    digest: str


@dataclass(frozen=True)
class Step:
    """A save of the open chapter: its step and its files, (number, bytes, digest of the header)."""

    step: int
    files: tuple[tuple[int, int, Digest], ...]


@dataclass
class Chapter:
    """Steps of one layout that follow each other.

    Attributes:
        layout, base: their files; `base` is None where nothing was written before.
        base_step: step whose state the base is; None where it is no whole state.
        first, last: steps of a closed chapter, of which first is last + 1 where only the base is left; None in the open one.
        records: changes of a closed chapter.
        steps: of the open chapter.
        files: of a closed chapter's steps, unless the manifest's list of files has them.
    """

    layout: IndexFile
    base: IndexFile | None
    base_step: int | None
    first: int | None = None
    last: int | None = None
    records: IndexFile | None = None
    steps: list[Step] = field(default_factory=list)
    files: tuple[tuple[int, int, Digest], ...] = ()


@dataclass(frozen=True)
class Volume:
    """A file in index/ that lists closed chapters, and their number."""

    file: IndexFile
    count: int


@dataclass
class Manifest:
    """What a store holds.

    Attributes:
        life: UUID of the life.
        parent: life and step from which it was forked; None for one that began by itself.
        kept: restorable steps, in order; the last is the newest.
        scores: of the best kept steps.
        keep: the policy of the last trainer.
        next_file, next_index: numbers of the next files.
        open: the chapter that saves go to; None before the first save.
        files: file of the segments that no chapter lists: those of a compaction or a fork.
        volumes: of the closed chapters, without those that were closed since the last write.
        processes: that wrote the newest step.
        merged: names of the volumes that newer ones took in; not written.
    """

    life: str
    parent: dict[str, Any] | None = None
    kept: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    keep: str = "last:1"
    next_file: int = 1
    next_index: int = 1
    open: Chapter | None = None
    files: IndexFile | None = None
    processes: int = 1
    volumes: list[Volume] = field(default_factory=list)
    merged: set[str] = field(default_factory=set)
    _folder: Path | None = None  # from which the volumes are read
    _chapters: list[Chapter] | None = field(default_factory=list)  # None if they are not read yet
    _ranges: tuple[list[int], list[list[int]]] = ([], [])  # kept steps of the last write, and their ranges

    @property
    def newest(self) -> int | None:
        return self.kept[-1] if self.kept else None

    @property
    def chapters(self) -> list[Chapter]:
        """Closed chapters, in order; read when they are first needed.

        Raises:
            DamagedStoreError: a volume is damaged.
        """
        if self._chapters is None:
            assert self._folder is not None
            index = Index(self._folder)
            self._chapters = [chapter for volume in self.volumes for chapter in index.chapters(volume.file)]
        return self._chapters

    @chapters.setter
    def chapters(self, chapters: list[Chapter]) -> None:
        self._chapters, self.volumes = chapters, []

    def write(self, folder: Path) -> int:
        """Replaces the manifest of a folder, and waits for the disk. Returns its bytes."""
        self._write_volume(folder)
        line = json.dumps(self._to_json(), separators=(",", ":"))
        data = f"{line}\n{hex_digest(digest(line.encode()))}\n".encode()
        path, partial, previous = folder / NAME, folder / f".{NAME}.new", folder / PREVIOUS
        try:
            for inner in (folder / SEGMENTS, folder / INDEX):  # names of new files
                sync(inner)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                with contextlib.suppress(OSError):  # without hard links there is no earlier manifest
                    previous.unlink(missing_ok=True)
                    os.link(path, previous)
            os.replace(partial, path)
            sync(folder)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
        return len(data)

    @classmethod
    def read(cls, folder: Path, name: str = NAME) -> Manifest:
        """Reads the manifest of a folder.

        Raises:
            StoreError: there is none, or it is of a newer version.
            DamagedStoreError: its checksum is wrong.
        """
        path = folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{folder} must be a store, got a folder without {name}.") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
        line, _, rest = data.partition(b"\n")
        if rest != f"{hex_digest(digest(line))}\n".encode():
            raise DamagedStoreError(f"{path} is damaged.{_remedy(folder, name)}")
        found = json.loads(line)
        if found["format"] not in READABLE:
            raise StoreError(f"{path} has format {found['format']}, and this version of tinyonn reads {FORMAT}; update tinyonn.")
        return cls._from_json(folder, found)

    def _write_volume(self, folder: Path) -> None:
        """Writes the chapters that were closed since the last write."""
        if self._chapters is None:
            return
        volumes = list(self.volumes)
        count = len(self._chapters) - sum(one.count for one in volumes)
        if not count:
            return
        while volumes and volumes[-1].count <= count:
            count += volumes[-1].count
            self.merged.add(volumes.pop().file.name)
        file = Index(folder).write_chapters(self.next_index, self._chapters[-count:])
        self.next_index += 1
        self.volumes = [*volumes, Volume(file, count)]

    def _kept_ranges(self) -> list[list[int]]:
        """Ranges of the kept steps; those of the last write are continued where they can be."""
        before, ranges = self._ranges
        if self.kept[: len(before)] != before:
            before, ranges = [], []
        ranges = to_ranges(self.kept[len(before) :], ranges)
        self._ranges = list(self.kept), ranges
        return ranges

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "life": self.life,
            "parent": self.parent,
            "kept": self._kept_ranges(),
            "scores": {str(step): score for step, score in self.scores.items()},
            "keep": self.keep,
            "next_file": self.next_file,
            "next_index": self.next_index,
            "processes": self.processes,
            "volumes": [[*(_index_to_json(one.file) or ()), one.count] for one in self.volumes],
            "open": None if self.open is None else _chapter_to_json(self.open),
            "files": _index_to_json(self.files),
        }

    @classmethod
    def _from_json(cls, folder: Path, found: dict[str, Any]) -> Manifest:
        return cls(
            life=found["life"],
            parent=found["parent"],
            kept=from_ranges(found["kept"]),
            scores={int(step): score for step, score in found["scores"].items()},
            keep=found["keep"],
            next_file=found["next_file"],
            next_index=found["next_index"],
            processes=found["processes"],
            open=None if found["open"] is None else _chapter_from_json(found["open"]),
            files=_index_from_json(found["files"]),
            volumes=[Volume(IndexFile(name, value), count) for name, value, count in found.get("volumes", [])],
            _folder=folder,
            _chapters=[_chapter_from_json(one) for one in found["chapters"]] if "chapters" in found else None,
        )


class Index:
    """Reads and writes the files in index/ of a store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / INDEX
        self._layouts: dict[str, Layout] = {}

    def layout(self, file: IndexFile) -> Layout:
        if file.name not in self._layouts:
            self._layouts[file.name] = Layout.from_json(self._read(file).decode())
        return self._layouts[file.name]

    def array(self, file: IndexFile) -> np.ndarray:
        found: np.ndarray = np.load(io.BytesIO(self._read(file)), allow_pickle=False)
        return found

    def write_layout(self, number: int, layout: Layout) -> IndexFile:
        file = self._write(f"layout-{number:08d}.json", layout.to_json().encode())
        self._layouts[file.name] = layout
        return file

    def write_array(self, kind: str, number: int, array: np.ndarray) -> IndexFile:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return self._write(f"{kind}-{number:08d}.npy", buffer.getvalue())

    def chapters(self, file: IndexFile) -> list[Chapter]:
        return [_chapter_from_json(one) for one in json.loads(self._read(file))]

    def write_chapters(self, number: int, chapters: list[Chapter]) -> IndexFile:
        text = json.dumps([_chapter_to_json(one) for one in chapters], separators=(",", ":"))
        return self._write(f"chapters-{number:08d}.json", text.encode())

    def check(self, file: IndexFile) -> None:
        self._read(file)

    def _read(self, file: IndexFile) -> bytes:
        path = self._folder / file.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedStoreError(f"{path} cannot be read: {error.strerror}.") from error
        if digest(data) != from_hex(file.digest):
            raise DamagedStoreError(f"{path} is damaged.")
        return data

    def _write(self, name: str, data: bytes) -> IndexFile:
        path = self._folder / name
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
        return IndexFile(name, hex_digest(digest(data)))


def _remedy(folder: Path, name: str) -> str:
    if name == PREVIOUS:
        return ""
    try:
        before = Manifest.read(folder, PREVIOUS)
    except StoreError:
        return ""
    return f" Step {before.newest} is still readable: `tinyonn life restore {folder} --step {before.newest}` goes back to it."


def _index_to_json(file: IndexFile | None) -> list[str] | None:
    return None if file is None else [file.name, file.digest]


def _index_from_json(found: list[str] | None) -> IndexFile | None:
    return None if found is None else IndexFile(*found)


def _chapter_to_json(chapter: Chapter) -> dict[str, Any]:
    found = {
        "layout": _index_to_json(chapter.layout),
        "base": _index_to_json(chapter.base),
        "base_step": chapter.base_step,
        "first": chapter.first,
        "last": chapter.last,
        "records": _index_to_json(chapter.records),
        "steps": [[one.step, _files_to_json(one.files)] for one in chapter.steps],
        "files": _files_to_json(chapter.files),
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _chapter_from_json(found: dict[str, Any]) -> Chapter:
    layout = _index_from_json(found["layout"])
    assert layout is not None
    return Chapter(
        layout=layout,
        base=_index_from_json(found.get("base")),
        base_step=found.get("base_step"),
        first=found.get("first"),
        last=found.get("last"),
        records=_index_from_json(found.get("records")),
        steps=[Step(step, _files_from_json(files)) for step, files in found.get("steps", [])],
        files=_files_from_json(found.get("files", [])),
    )


def _files_to_json(files: tuple[tuple[int, int, Digest], ...]) -> list[list[Any]]:
    return [[number, size, hex_digest(value)] for number, size, value in files]


def _files_from_json(found: list[list[Any]]) -> tuple[tuple[int, int, Digest], ...]:
    return tuple((number, size, from_hex(value)) for number, size, value in found)
