"""Checks of a store: every checksum of every file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .closing import read_note
from .errors import StoreError
from .ledger import Ledger
from .life_log import LOG, LifeLogError, read_life_log
from .manifest import NAME, PREVIOUS, Manifest
from .segment import Files, damaged_entries, file_name, read_segment

TRIES = 3  # a trainer's compaction may delete files while they are read; then all is read again


@dataclass(frozen=True)
class Verification:
    """What a check found.

    Attributes:
        files, bytes: segments that were read.
        readable: kept steps of which every chunk is whole.
        lost: other kept steps.
        faults: a line for each damage; empty if all is whole.
    """

    files: int
    bytes: int
    readable: list[int]
    lost: list[int]
    faults: list[str]


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Reads all of a store, in which a trainer may run meanwhile, and compares every checksum.

    Raises:
        StoreError: there is no manifest, or it is of a newer version.
    """
    folder = Path(folder)
    for _ in range(TRIES - 1):
        before = _bytes_of(folder)
        found = _verify(folder)
        if not found.faults or _bytes_of(folder) == before:
            return found
    return _verify(folder)


def _verify(folder: Path) -> Verification:
    faults: list[str] = []
    manifest = _manifest(folder, faults)
    ledger = Ledger(folder, manifest)
    with contextlib.suppress(StoreError):  # of a volume, which is noted by then
        for one in ledger.index_files():
            _try(faults, partial(ledger.index.check, one))
    damaged: set[int] = set()
    total = number = 0
    try:
        files = ledger.files()
    except StoreError:  # noted above
        files = []  # type: ignore[assignment]
    for row in files:
        number, total = number + 1, total + int(row["size"])
        file = int(row["file"])
        try:
            segment = read_segment(ledger.segments, file, tuple(row["digest"].tolist()), int(row["size"]))
        except StoreError as error:
            faults.append(str(error))
            damaged.add(file)
            continue
        names = [entry.name for entry in damaged_entries(ledger.segments, segment)]
        if names:
            damaged.add(file)
            faults += [f"{ledger.segments / file_name(file)}: {name} is damaged." for name in names]
    readable, lost = _steps(ledger, damaged, bool(faults))
    note = None
    try:
        note = read_note(folder)
    except StoreError as error:
        faults.append(str(error))
    _check_log(folder, faults, 0 if note is None else note.log.size)
    return Verification(number, total, readable, lost, faults)


def _bytes_of(folder: Path) -> bytes | None:
    """The manifest; None if it cannot be read."""
    with contextlib.suppress(OSError):
        return (folder / NAME).read_bytes()
    return None


def _manifest(folder: Path, faults: list[str]) -> Manifest:
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        if not (folder / PREVIOUS).exists():
            raise
        faults.append(str(error))
        return Manifest.read(folder, PREVIOUS)
    if (folder / PREVIOUS).exists():
        _try(faults, lambda: Manifest.read(folder, PREVIOUS))
    return manifest


def _steps(ledger: Ledger, bad: set[int], broken: bool) -> tuple[list[int], list[int]]:
    """Kept steps of which every chunk is whole, and the others; of files that are not in `bad`, all chunks are."""
    readable: list[int] = []
    lost: list[int] = []
    if not bad and not broken:
        return list(ledger.manifest.kept), lost
    files = Files(ledger.segments)
    known: dict[tuple[int, int, int], bool] = {}  # file, offset and size of a chunk -> whether it is whole
    for step in ledger.manifest.kept:
        try:
            _, table = ledger.at(step)
        except (StoreError, IndexError, ValueError):
            lost.append(step)
            continue
        whole = True
        for place in table[np.isin(table["file"], list(bad))]:
            key = int(place["file"]), int(place["offset"]), int(place["size"])
            if key not in known:
                known[key] = _is_whole(files, place)
            whole = whole and known[key]
        (readable if whole else lost).append(step)
    return readable, lost


def _is_whole(files: Files, place: np.void) -> bool:
    try:
        files.checked(place, "")
    except StoreError:
        return False
    return True


def _check_log(folder: Path, faults: list[str], least: int) -> None:
    if not (folder / LOG).exists():
        faults.append(f"{folder / LOG} is missing.")
        return
    try:
        found = read_life_log(folder / LOG)
    except LifeLogError as error:
        faults.append(str(error))
        return
    if (size := (folder / LOG).stat().st_size) < least:
        faults.append(f"{folder / LOG} must have at least {least:,} bytes, as when the store was closed, got {size:,}.")
    if found.torn is not None:
        faults.append(f"{folder / LOG} ends in a part of a record.")


def _try(faults: list[str], run: Callable[[], object]) -> None:
    try:
        run()
    except StoreError as error:
        faults.append(str(error))
