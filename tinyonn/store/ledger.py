"""What a store holds, and the changes to it; used by one process, the first.

append     a step: its segments are on the disk, the manifest is replaced, the step is durable
at         where each chunk was at a step
rewind     forgets the steps after one
sweep      deletes files that the manifest does not name
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .errors import StoreError
from .keep import Keep
from .layout import Layout, empty_table, moved
from .manifest import CHAPTER, FILE, INDEX, PREVIOUS, RECORD, SEGMENTS, Chapter, Index, IndexFile, Manifest, Step
from .segment import Segment, file_name, read_segment

_OWN = re.compile(r"\d{8,}\.safetensors|(layout|table|records|files|chapters)-\d{8,}\.(json|npy)")
MOST_STATES = 8  # a chapter ends when its segments have the bytes of so many whole states


class Ledger:
    """A store's manifest, and the files that it names.

    Args:
        folder: the store.
        manifest: as read, or new.

    Attributes:
        manifest: what is durable, after each call.
        index: the files in index/.
        is_tidy: whether the manifest names all files, except for volumes that newer ones took in; false if that is not known.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = Index(folder)
        self.is_tidy = False
        self._table: np.ndarray | None = None  # at the newest step
        self._changes: list[np.ndarray] = []  # of the open chapter's steps

    @property
    def segments(self) -> Path:
        return self.folder / SEGMENTS

    # ---- reading ----

    def at(self, step: int) -> tuple[Layout, np.ndarray]:
        """Where the chunks of a kept step are: its layout, and (C,) `PLACE`.

        Raises:
            StoreError: the step is not kept.
            DamagedStoreError: a file that says so is damaged.
        """
        manifest = self.manifest
        if step not in set(manifest.kept):
            raise StoreError(f"step must be a kept one, {_shown_steps(manifest.kept)}, got {step}.")
        opened = [manifest.open] if manifest.open else []
        found = self._within(opened, step) or self._within(manifest.chapters, step)
        if found is None:  # never written by this code
            raise StoreError(f"step {step} is in no chapter of {self.folder}.")
        return found

    def _within(self, chapters: list[Chapter], step: int) -> tuple[Layout, np.ndarray] | None:
        """`at` a step that one of the chapters has; None if none has it."""
        for chapter in chapters:
            if chapter.base_step == step:
                return self.index.layout(chapter.layout), self.base(chapter)
        for chapter in chapters:
            inside = chapter.first is not None and chapter.last is not None and chapter.first <= step <= chapter.last
            if inside or any(one.step == step for one in chapter.steps):
                return self._apply(chapter, self.changes(chapter, step))
        return None

    def base(self, chapter: Chapter) -> np.ndarray:
        layout = self.index.layout(chapter.layout)
        return empty_table(layout) if chapter.base is None else self.index.array(chapter.base)

    def changes(self, chapter: Chapter, upto: int | None = None) -> np.ndarray:
        """Changes of a chapter's steps as `RECORD`, in order."""
        if chapter.records is not None:
            found = self.index.array(chapter.records)
            return found if upto is None else found[found["step"] <= upto]
        layout = self.index.layout(chapter.layout)
        parts = [self._changes_of(layout, one) for one in chapter.steps if upto is None or one.step <= upto]
        return np.concatenate(parts) if parts else np.zeros(0, RECORD)

    def table(self) -> tuple[Layout, np.ndarray]:
        """Where the chunks of the newest state are; of an empty store, those of its layout."""
        chapter = self.manifest.open
        assert chapter is not None
        if self._table is None:
            self._changes = [self._changes_of(self.index.layout(chapter.layout), one) for one in chapter.steps]
            self._table = self._apply(chapter, np.concatenate([np.zeros(0, RECORD), *self._changes]))[1]
        return self.index.layout(chapter.layout), self._table

    def files(self) -> np.ndarray:
        """All segments as `FILE`."""
        manifest = self.manifest
        listed = np.zeros(0, FILE) if manifest.files is None else self.index.array(manifest.files)
        closed = [file for chapter in manifest.chapters for file in chapter.files]
        opened = [file for step in (manifest.open.steps if manifest.open else []) for file in step.files]
        return np.concatenate([listed, np.array([*closed, *opened], FILE)])

    def stored_bytes(self) -> int:
        """Bytes of the store on the disk."""
        total = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    # ---- writing ----

    def begin(self, layout: Layout) -> None:
        """Makes `layout` that of the saves from now on; takes effect with the next `append`."""
        chapter = self.manifest.open
        if chapter is not None and self.index.layout(chapter.layout) == layout:
            return
        with self.writing():
            file = self.index.write_layout(self.next_index(), layout)
            base = None
            if chapter is not None:
                before, table = self.table()
                table = moved(table, before, layout)
                base = self.index.write_array("table", self.next_index(), table)  # first, so that an error changes nothing
                if chapter.steps or chapter.base_step is not None:
                    self._close(chapter)
                else:
                    self.is_tidy = False  # nothing was saved with the layout before, and its files stay
        if chapter is not None:
            self._table = table
        else:
            self._table = empty_table(layout)
        self.manifest.open, self._changes = Chapter(file, base, None), []

    def append(self, step: int, segments: Sequence[Segment], score: float | None, keep: Keep) -> int:
        """Makes a step durable, whose segments are. Returns the bytes of the manifest and of what was written in index/."""
        manifest = self.manifest
        chapter = manifest.open
        assert chapter is not None
        layout, table = self.table()
        written = 0
        if len(chapter.steps) >= CHAPTER or _bytes_of(chapter.steps) > MOST_STATES * layout.total_bytes():
            self.close_chapter()
            written += sum((self.folder / INDEX / file.name).stat().st_size for file in self._named_last())
            chapter = manifest.open
            assert chapter is not None
        done = Step(step, tuple((one.number, one.size, one.digest) for one in segments))
        changes = _records(layout, step, segments)
        chapter.steps.append(done)
        self._changes.append(changes)
        _put(table, changes)
        if score is not None and math.isfinite(score):
            manifest.scores[step] = float(score)
        manifest.kept = keep.chosen([*manifest.kept, step], manifest.scores)
        manifest.scores = {one: manifest.scores[one] for one in keep.best_of(manifest.scores)}
        manifest.keep = str(keep)
        return written + manifest.write(self.folder)

    def close_chapter(self) -> None:
        """Gathers the changes of the open chapter's steps, and opens the next one. Takes effect with the next write of the manifest."""
        chapter = self.manifest.open
        assert chapter is not None
        _, table = self.table()
        if not chapter.steps:
            return
        step = chapter.steps[-1].step
        with self.writing():
            base = self.index.write_array("table", self.next_index(), table)  # first, so that an error changes nothing
            self._close(chapter)
        self.manifest.open, self._changes = Chapter(chapter.layout, base, step), []

    def rewind(self, step: int) -> None:
        """Forgets the steps after a kept one.

        Raises:
            StoreError: the step is not kept; the manifest cannot be written, and then the later steps stay.
        """
        layout, table = self.at(step)
        manifest = self.manifest
        with self.writing():
            chapters, newest = self._until(step, layout, table)
        manifest.chapters, manifest.open = chapters, newest
        manifest.kept = [one for one in manifest.kept if one <= step]
        manifest.scores = {one: score for one, score in manifest.scores.items() if one <= step}
        self._table = None
        try:
            self.publish()
        except BaseException:  # also an interrupt
            self.manifest, self.is_tidy = Manifest.read(self.folder), False
            raise

    def _until(self, step: int, layout: Layout, table: np.ndarray) -> tuple[list[Chapter], Chapter]:
        """The closed chapters and the open one up to a step, whose chunks are at `table`."""
        manifest = self.manifest
        chapters = []
        for chapter in manifest.chapters:
            assert chapter.first is not None
            assert chapter.last is not None
            if chapter.first > step:
                continue
            if chapter.last > step:
                records = self.index.write_array("records", self.next_index(), self.changes(chapter, step))
                chapter = replace(chapter, last=step, records=records)
            chapters.append(chapter)
        newest = manifest.open
        if newest is not None and any(one.step <= step for one in newest.steps):
            newest.steps = [one for one in newest.steps if one.step <= step]
        elif newest is None or newest.base_step != step:
            base = self.index.write_array("table", self.next_index(), table)
            file = next(
                one.layout for one in [*manifest.chapters, *([newest] if newest else [])] if self.index.layout(one.layout) == layout
            )
            newest = Chapter(file, base, step)
        else:
            newest.steps = []
        return chapters, newest

    def replace_table(self, table: np.ndarray) -> None:
        """The newest state is at other places now."""
        self._table = table

    def publish(self) -> None:
        """Replaces the manifest after a change that dropped files, and deletes them."""
        with self.writing():
            self.manifest.write(self.folder)
            (self.folder / PREVIOUS).unlink(missing_ok=True)  # it names files that are about to go
            self.sweep()

    def sweep(self) -> None:
        """Deletes files of a store that neither the manifest nor the one before it names.

        Raises:
            StoreError: the folder cannot be written.
            DamagedStoreError: the list of files is damaged; nothing is deleted.
        """
        names, before = self._named(), set()
        with contextlib.suppress(StoreError):  # there may be no whole manifest before
            earlier = Ledger(self.folder, Manifest.read(self.folder, PREVIOUS))
            before = earlier._named() - names
            self.manifest.merged |= before & {file.name for file in earlier._lists()}
        try:
            for folder in (self.segments, self.folder / INDEX):
                for path in folder.iterdir():
                    if path.name not in names and path.name not in before and _OWN.fullmatch(path.name):
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.folder} must be a store that can be written, got {error.strerror}.") from error
        self.is_tidy = before <= self.manifest.merged

    def check_lists(self) -> None:
        """Checks the lists of files and chapters, without reading what is in them.

        Raises:
            DamagedStoreError: one is damaged.
        """
        for file in self._lists():
            self.index.check(file)

    def tidy(self) -> bool:
        """Deletes volumes that newer ones took in, unless the manifest before has them. Returns whether all files are needed now.

        Raises:
            StoreError: the manifest cannot be read.
        """
        written = Manifest.read(self.folder)
        if (written.next_file, written.next_index) != (self.manifest.next_file, self.manifest.next_index):
            return False  # files were written, and the manifest that names them was not
        before: set[str] = set()
        with contextlib.suppress(StoreError):
            before = {file.name for file in Ledger(self.folder, Manifest.read(self.folder, PREVIOUS))._lists()}
        for name in self.manifest.merged - before:
            (self.folder / INDEX / name).unlink(missing_ok=True)
        return self.is_tidy and not self.manifest.merged & before

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes files; after an error, some of them may be left."""
        try:
            yield
        except BaseException:
            self.is_tidy = False
            raise

    def _lists(self) -> list[IndexFile]:
        """The files in index/ that list files or chapters."""
        return [one.file for one in self.manifest.volumes] + ([] if self.manifest.files is None else [self.manifest.files])

    def _named(self) -> set[str]:
        """Names of the files in segments/ and in index/ that the manifest names, itself or in its lists."""
        return {file_name(int(number)) for number in self.files()["file"]} | {file.name for file in self.index_files()}

    def index_files(self) -> Iterator[IndexFile]:
        """Files in index/ that the manifest names; first those with lists, which must be whole for the others.

        Raises:
            DamagedStoreError: a volume is damaged.
        """
        manifest = self.manifest
        yield from self._lists()
        for chapter in [*([manifest.open] if manifest.open else []), *manifest.chapters]:
            yield from (file for file in (chapter.layout, chapter.base, chapter.records) if file is not None)

    def next_files(self, count: int) -> int:
        """Reserves numbers of files; returns the first. They are used up also if the save fails."""
        first = self.manifest.next_file
        self.manifest.next_file += count
        return first

    def _close(self, chapter: Chapter) -> None:
        records = self.index.write_array("records", self.next_index(), np.concatenate([np.zeros(0, RECORD), *self._changes]))
        if chapter.steps:
            first, last = chapter.steps[0].step, chapter.steps[-1].step
        else:  # only its base is a step
            assert chapter.base_step is not None
            first, last = chapter.base_step + 1, chapter.base_step
        files = tuple(file for step in chapter.steps for file in step.files)
        self.manifest.chapters.append(Chapter(chapter.layout, chapter.base, chapter.base_step, first, last, records, files=files))

    def _named_last(self) -> list[IndexFile]:
        """What closing a chapter wrote."""
        manifest = self.manifest
        assert manifest.open is not None
        return [file for file in (manifest.chapters[-1].records, manifest.open.base) if file is not None]

    def _apply(self, chapter: Chapter, changes: np.ndarray) -> tuple[Layout, np.ndarray]:
        table = self.base(chapter).copy()
        _put(table, changes)
        return self.index.layout(chapter.layout), table

    def _changes_of(self, layout: Layout, step: Step) -> np.ndarray:
        segments = [read_segment(self.segments, number, value, size) for number, size, value in step.files]
        return _records(layout, step.step, segments)

    def next_index(self) -> int:
        """Number of the next file in index/."""
        self.manifest.next_index += 1
        return self.manifest.next_index - 1


def _records(layout: Layout, step: int, segments: Sequence[Segment]) -> np.ndarray:
    """The changes in the segments of one step."""
    numbers = layout.numbers
    rows = [
        (segment.number, entry.offset, entry.size, entry.digest, numbers[entry.name], step)
        for segment in segments
        for entry in segment.entries
    ]
    return np.array(rows, RECORD)


def _put(table: np.ndarray, changes: np.ndarray) -> None:
    """Applies changes in their order; of several for a chunk, the last counts."""
    order = np.arange(len(changes))
    chunks, first = np.unique(changes["chunk"][::-1], return_index=True)
    last = order[::-1][first] if len(order) else first
    for name in table.dtype.names or ():
        table[name][chunks] = changes[name][last]


def _bytes_of(steps: Sequence[Step]) -> int:
    return sum(size for one in steps for _, size, _ in one.files)


def _shown_steps(kept: list[int]) -> str:
    if not kept:
        return "of which there is none"
    shown = [*map(str, kept)] if len(kept) <= 6 else [*map(str, kept[:2]), "…", *map(str, kept[-3:])]
    return ", ".join(shown)
