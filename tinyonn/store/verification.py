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
    damaged: dict[int, set[str]] = {}
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
            damaged[file] = {""}
            continue
        names = list(damaged_entries(ledger.segments, segment))
        if names:
            damaged[file] = set(names)
            faults += [f"{ledger.segments / file_name(file)}: {name} is damaged." for name in names]
    readable, lost = _steps(ledger, damaged, bool(faults))
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


def _steps(ledger: Ledger, damaged: dict[int, set[str]], broken: bool) -> tuple[list[int], list[int]]:
    readable: list[int] = []
    lost: list[int] = []
    bad = set(damaged)
    if not bad and not broken:
        return list(ledger.manifest.kept), lost
    for step in ledger.manifest.kept:
        try:
            layout, table = ledger.at(step)
        except (StoreError, IndexError, ValueError):
            lost.append(step)
            continue
        used = [number for number, file in enumerate(table["file"].tolist()) if file in bad]
        hit = any(_is_hit(damaged[int(table["file"][number])], layout.names[number]) for number in used)
        (lost if hit else readable).append(step)
    return readable, lost


def _is_hit(names: set[str], name: str) -> bool:
    """Whether a chunk is among damaged ones; merged segments add the number of the segment that it came from."""
    return "" in names or any(one.partition(" @")[0] == name for one in names)


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
