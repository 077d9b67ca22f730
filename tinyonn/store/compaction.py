"""Compaction: drops what no kept step needs, and merges segments.

A change of a chunk is needed if a kept step lies between it and the next change of that chunk. Segments with other content, and small ones,
are copied to new segments without it; then the manifest is replaced, and the old ones are deleted. Nothing is changed in place, so a
compaction that is killed leaves the store as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dcp import view_bytes
from .errors import StoreError
from .layout import Layout
from .ledger import Ledger
from .manifest import FILE, RECORD, Chapter
from .segment import Files, Segment, file_name, free_bytes, write_segment

PACK = 256 * 2**20  # bytes of a merged segment, about
WHOLE = PACK // 2  # a segment of this size without unneeded content stays as it is


Moves = dict[tuple[int, int, int], tuple[int, int]]  # file, offset and size of a chunk -> its new file and offset


class Compaction(NamedTuple):
    """What a compaction did, in bytes of segments and in numbers of them."""

    bytes_before: int
    bytes_after: int
    files_before: int
    files_after: int


class _Kept(NamedTuple):
    """What is left of a chapter: its base and its changes, None where they are not needed."""

    chapter: Chapter
    layout: Layout
    base: np.ndarray | None
    changes: np.ndarray | None


def compact(ledger: Ledger) -> Compaction:
    """Compacts a store, and waits for the disk.

    Raises:
        StoreError: the disk has no room for the merged segments; the store is as it was.
        DamagedStoreError: a segment that is still needed is damaged; the store is as it was.
    """
    manifest = ledger.manifest
    before = ledger.files()
    if manifest.open is None:
        return Compaction(0, 0, 0, 0)
    ledger.close_chapter()
    parts = [part for chapter in manifest.chapters if (part := _needed(ledger, chapter, manifest.kept)) is not None]
    _, table = ledger.table()
    layout = ledger.index.layout(manifest.open.layout)
    table = table.copy()  # so that an error leaves the ledger as it was
    parts.append(_Kept(manifest.open, layout, table, None))
    places = _places(parts)
    rewritten = _rewritten(ledger, places)
    stay = np.isin(before["file"], np.setdiff1d(np.unique(places["file"]), rewritten))
    packs: list[Segment] = []
    try:
        with ledger.writing():
            moved = _copy(ledger, places[np.isin(places["file"], rewritten)], packs)
            chapters = [_written(ledger, part, moved) for part in parts]
            after = np.concatenate([before[stay], np.array([(one.number, one.size, one.digest) for one in packs], FILE)])
            files = ledger.index.write_array("files", ledger.next_index(), after)
    except BaseException:
        for pack in packs:
            (ledger.segments / file_name(pack.number)).unlink(missing_ok=True)
        raise
    manifest.files, manifest.chapters, manifest.open = files, chapters[:-1], chapters[-1]
    ledger.replace_table(table)
    ledger.publish()
    return Compaction(int(before["size"].sum()), int(after["size"].sum()), len(before), len(after))


def unneeded_bytes(ledger: Ledger) -> tuple[int, int]:
    """Bytes of all segments, and of these what no kept step needs; without the open chapter's earlier steps, which count as needed."""
    manifest = ledger.manifest
    files = ledger.files()
    total = int(files["size"].sum())
    if manifest.open is None or not manifest.chapters:
        return total, 0
    parts = [part for chapter in manifest.chapters if (part := _needed(ledger, chapter, manifest.kept)) is not None]
    layout, table = ledger.table()
    opened = _Kept(manifest.open, layout, ledger.base(manifest.open), ledger.changes(manifest.open))
    places = _places([*parts, opened, _Kept(manifest.open, layout, table, None)])
    return total, max(0, total - int(places["size"].sum()))


def _needed(ledger: Ledger, chapter: Chapter, kept: list[int]) -> _Kept | None:
    """What kept steps need of a closed chapter; None if nothing. Its last step may be the base of the next chapter."""
    assert chapter.first is not None
    assert chapter.last is not None
    steps = np.array([step for step in kept if chapter.first <= step <= chapter.last], np.int64)
    if any(other.base_step == chapter.last for other in [*ledger.manifest.chapters, ledger.manifest.open] if other is not None):
        steps = steps[steps != chapter.last]
    base_step = chapter.base_step is not None and chapter.base_step in kept
    layout = ledger.index.layout(chapter.layout)
    base = ledger.base(chapter).copy()
    if not len(steps):
        if chapter.base_step is None or not base_step:
            return None
        left = replace(chapter, first=chapter.base_step + 1, last=chapter.base_step)
        return _Kept(left, layout, base, np.zeros(0, RECORD))
    changes = ledger.changes(chapter, int(steps[-1]))
    following = _following(changes)
    later = np.searchsorted(steps, changes["step"])  # the first kept step from a change on
    needed = (later < len(steps)) & (steps[np.minimum(later, len(steps) - 1)] < following)
    first = np.full(len(base), np.iinfo(np.int64).max)
    np.minimum.at(first, changes["chunk"], changes["step"])
    if not base_step:
        base[steps[0] >= first] = np.zeros((), base.dtype)
        base["file"][steps[0] >= first] = -1
    return _Kept(replace(chapter, last=int(steps[-1])), layout, base, changes[needed])


def _following(changes: np.ndarray) -> np.ndarray:
    """Step of the next change of the same chunk, a large number for the last."""
    order = np.lexsort((changes["step"], changes["chunk"]))
    found = np.full(len(changes), np.iinfo(np.int64).max)
    same = changes["chunk"][order[1:]] == changes["chunk"][order[:-1]]
    found[order[:-1][same]] = changes["step"][order[1:]][same]
    return found


def _places(parts: list[_Kept]) -> np.ndarray:
    """All needed places, each once, with a name that is unique in a segment; sorted by tensor, so that rows lie together."""
    rows = []
    for part in parts:
        for found in (part.base, part.changes):
            if found is None:
                continue
            chunks = np.arange(len(found)) if "chunk" not in (found.dtype.names or ()) else found["chunk"]
            used = found["file"] >= 0
            names = [part.layout.names[number] for number in chunks[used]]
            one = np.zeros(len(names), [("file", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("digest", "<u8", (2,)), ("name", "O")])
            for name in ("file", "offset", "size", "digest"):
                one[name] = found[name][used]
            one["name"] = names
            rows.append(one)
    every = np.concatenate(rows)
    _, first = np.unique(np.stack([every["file"], every["offset"], every["size"]], 1), axis=0, return_index=True)
    return every[first]


def _rewritten(ledger: Ledger, places: np.ndarray) -> np.ndarray:
    """Files that are copied: those that are small, or hold what nobody needs."""
    files = ledger.files()
    numbers, inverse = np.unique(places["file"], return_inverse=True)
    needed = dict(zip(numbers.tolist(), np.bincount(inverse, places["size"].astype(float)).tolist(), strict=True))
    sizes = dict(zip(files["file"].tolist(), files["size"].tolist(), strict=True))
    whole = [number for number in numbers.tolist() if sizes[number] >= WHOLE and needed[number] > 0.9 * sizes[number]]
    return np.setdiff1d(numbers, np.array(whole, np.int64))


def _copy(ledger: Ledger, places: np.ndarray, packs: list[Segment]) -> Moves:
    """Copies chunks to new segments, which are added to `packs`. Returns where each chunk went."""
    total = int(places["size"].sum())
    free = free_bytes(ledger.segments)
    if total + 2**16 * len(places) // 100 > free:
        raise StoreError(f"{ledger.folder} needs {total:,} bytes for its merged segments, and the disk has {free:,}.")
    files = Files(ledger.segments)
    order = sorted(range(len(places)), key=lambda row: (places["name"][row], int(places["file"][row])))
    moved: Moves = {}
    group: list[int] = []
    size = 0
    for place, row in enumerate(order):
        group.append(row)
        size += int(places["size"][row])
        if place + 1 == len(order) or size >= PACK:
            packs.append(_write_pack(ledger, files, places, group, moved))
            group, size = [], 0
    return moved


def _write_pack(ledger: Ledger, files: Files, places: np.ndarray, group: list[int], moved: Moves) -> Segment:
    number = ledger.next_files(1)
    tensors: dict[str, Tensor] = {}
    digests = {}
    origin = {}
    for row in group:
        place = places[row]
        name = f"{place['name']} @{int(place['file'])}+{int(place['offset'])}"  # one chunk of several steps
        tensors[name] = view_bytes(files.checked(place, str(place["name"])), torch.uint8)
        digests[name] = (int(place["digest"][0]), int(place["digest"][1]))
        origin[name] = int(place["file"]), int(place["offset"]), int(place["size"])
    segment = write_segment(ledger.segments, number, ledger.manifest.newest or 0, 0, tensors, digests, {})
    assert len(segment.entries) == len(group)
    for entry in segment.entries:
        moved[origin[entry.name]] = number, entry.offset
    return segment


def _written(ledger: Ledger, part: _Kept, moved: Moves) -> Chapter:
    """Writes what is left of a chapter, with the new places of chunks that moved."""
    for rows in (part.base, part.changes):
        if rows is not None:
            _move(rows, moved)
    base = None if part.base is None else ledger.index.write_array("table", ledger.next_index(), part.base)
    records = None if part.changes is None else ledger.index.write_array("records", ledger.next_index(), part.changes)
    old = part.chapter
    return Chapter(old.layout, base, old.base_step, old.first, old.last, records)


def _move(rows: np.ndarray, moved: Moves) -> None:
    """Writes the new places into a table or into changes, in place."""
    for row, key in enumerate(zip(rows["file"].tolist(), rows["offset"].tolist(), rows["size"].tolist(), strict=True)):
        found = moved.get(key)
        if found is not None:
            rows["file"][row], rows["offset"][row] = found
