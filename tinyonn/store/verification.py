"""Checks of a store: every checksum of every file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import StoreError
from .ledger import Ledger
from .life_log import LOG, LifeLogError, read_life_log
from .manifest import PREVIOUS, Manifest
from .segment import damaged_entries, file_name, read_segment


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
    """Reads all of a store and compares every checksum.

    Args:
        folder: a store. Another process may save into it; files that it deletes meanwhile, as in a compaction, are reported as faults.

    Raises:
        StoreError: there is no manifest, or it is of a newer version.
    """
    folder = Path(folder)
    faults: list[str] = []
    manifest = _manifest(folder, faults)
    ledger = Ledger(folder, manifest)
    with contextlib.suppress(StoreError):  # of a volume, which is noted by then
        for one in ledger.index_files():
            _try(faults, partial(ledger.index.check, one))
    unread: set[int] = set()  # segments whose header is damaged
    damaged: set[tuple[int, int, int]] = set()  # file, offset and size of chunks
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
            unread.add(file)
            continue
        for entry in damaged_entries(ledger.segments, segment):
            damaged.add((file, entry.offset, entry.size))
            faults.append(f"{ledger.segments / file_name(file)}: {entry.name} is damaged.")
    readable, lost = _steps(ledger, unread, damaged) if faults else (list(manifest.kept), [])
    _check_log(folder, faults)
    return Verification(number, total, readable, lost, faults)


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


def _steps(ledger: Ledger, unread: set[int], damaged: set[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """Kept steps of which every chunk is whole, and the others."""
    readable: list[int] = []
    lost: list[int] = []
    for step in ledger.manifest.kept:
        try:
            _, table = ledger.at(step)
        except (StoreError, IndexError, ValueError):
            lost.append(step)
            continue
        places = zip(table["file"].tolist(), table["offset"].tolist(), table["size"].tolist(), strict=True)
        hit = any(place[0] in unread or place in damaged for place in places)
        (lost if hit else readable).append(step)
    return readable, lost


def _check_log(folder: Path, faults: list[str]) -> None:
    if not (folder / LOG).exists():
        faults.append(f"{folder / LOG} is missing.")
        return
    try:
        found = read_life_log(folder / LOG)
    except LifeLogError as error:
        faults.append(str(error))
        return
    if found.torn is not None:
        faults.append(f"{folder / LOG} ends in a part of a record.")


def _try(faults: list[str], run: Callable[[], object]) -> None:
    try:
        run()
    except StoreError as error:
        faults.append(str(error))
