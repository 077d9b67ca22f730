"""Fork: a new life that begins at a step of another one, and shares its segments."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from .._io.files import link_or_copy
from .._io.locks import LOCK, lock_file
from .._io.new_folder import new_folder
from ..errors import InputError
from .errors import StoreError
from .ledger import Ledger
from .life_log import LOG, LifeLog
from .manifest import INDEX, SEGMENTS, Chapter, Manifest
from .segment import file_name

PARENTS = "parents"


def fork(source: str | os.PathLike[str], target: str | os.PathLike[str], step: int | None = None) -> Manifest:
    """Makes a store with a new identity from a step of another store, whose trainer may run meanwhile.

    The segments are hard links, so they take no room and stay when one of the stores deletes them; on another disk they are copied. The
    logs of the lives before are copied into the folder `parents`.

    Args:
        source: a store.
        target: folder of the new store; must not exist, or be empty.
        step: a kept step; None for the newest.

    Returns:
        The manifest of the new store.

    Raises:
        StoreError: the step is not kept; target is not empty or cannot be written; the disk has no room for copies.
    """
    try:
        with new_folder(target) as partial:
            manifest = write_fork(Path(source), partial, step)
    except StoreError:
        raise
    except InputError as error:
        raise StoreError(str(error)) from error
    note_fork(Path(source), manifest, Path(target))
    return manifest


def write_fork(source: Path, target: Path, step: int | None) -> Manifest:
    """Writes what `fork` makes into a folder of the caller, who removes it after an error.

    Raises:
        StoreError: the step is not kept; a segment is missing; the disk has no room for copies.
    """
    ledger = Ledger(source, Manifest.read(source))
    begin = ledger.manifest.newest if step is None else step
    if begin is None:
        raise StoreError(f"{source} has no step yet, so nothing can be forked.")
    layout, table = ledger.at(begin)
    for one in (target, target / SEGMENTS, target / INDEX):
        one.mkdir(parents=True, exist_ok=True)
    numbers = sorted({int(number) for number in table["file"] if number >= 0})
    _link(ledger, target, numbers)
    manifest = Manifest(
        str(uuid.uuid4()),
        {"life": ledger.manifest.life, "step": begin},
        kept=[begin],
        scores={one: score for one, score in ledger.manifest.scores.items() if one == begin},
        keep=ledger.manifest.keep,
        next_file=numbers[-1] + 1 if numbers else 1,
        processes=ledger.manifest.processes,
    )
    made = Ledger(target, manifest)
    files = ledger.files()
    manifest.files = made.index.write_array("files", made.next_index(), files[np.isin(files["file"], numbers)])
    file = made.index.write_layout(made.next_index(), layout)
    manifest.open = Chapter(file, made.index.write_array("table", made.next_index(), table), begin)
    _copy_logs(source, target, ledger.manifest.life)
    with LifeLog(target / LOG) as log:
        log.append("begin", begin, durable=True, life=manifest.life, parent=manifest.parent)
    manifest.write(target)
    return manifest


def note_fork(source: Path, manifest: Manifest, target: Path) -> None:
    """Writes a fork into the log of its parent, unless a trainer has it open or it cannot be written; the fork's own log has it anyway."""
    assert manifest.parent is not None
    with contextlib.suppress(OSError, ValueError):
        lock = lock_file(source / LOCK)
        try:
            with LifeLog(source / LOG) as log:
                log.append("fork", manifest.parent["step"], durable=True, child=manifest.life, folder=str(target.resolve()))
        finally:
            os.close(lock)


def shared_bytes(source: str | os.PathLike[str], step: int | None = None) -> int:
    """Bytes of the segments that a fork at a step uses."""
    ledger = Ledger(Path(source), Manifest.read(Path(source)))
    newest = ledger.manifest.newest
    if newest is None:
        return 0
    _, table = ledger.at(newest if step is None else step)
    files = ledger.files()
    return int(files["size"][np.isin(files["file"], table["file"])].sum())


def _link(ledger: Ledger, target: Path, numbers: list[int]) -> None:
    linked = True
    for number in numbers:
        name = file_name(number)
        try:
            link_or_copy(ledger.segments / name, target / SEGMENTS / name)
        except FileNotFoundError:
            raise StoreError(f"{ledger.segments / name} is missing; a trainer may have compacted meanwhile, so try again.") from None
        if linked and (target / SEGMENTS / name).stat().st_nlink == 1:  # another disk, or one without hard links
            linked = False
            need = sum((ledger.segments / file_name(one)).stat().st_size for one in numbers if one > number)
            free = shutil.disk_usage(target).free
            if need > free:
                raise StoreError(f"{target} needs {need:,} bytes for more copies of segments, and its disk has {free:,}.")


def _copy_logs(source: Path, target: Path, life: str) -> None:
    logs = {path.name: path for path in (source / PARENTS).glob("*.jsonl")}
    if (source / LOG).is_file():
        logs[f"{life}.jsonl"] = source / LOG
    if logs:
        (target / PARENTS).mkdir(exist_ok=True)
    for name, path in logs.items():
        shutil.copyfile(path, target / PARENTS / name)
