"""Fork: a new life that begins at a step of another one, and shares its segments."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from .._io.files import sync
from .._io.locks import lock_file
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
    source, target = Path(source), Path(target)
    ledger = Ledger(source, Manifest.read(source))
    begin = ledger.manifest.newest if step is None else step
    if begin is None:
        raise StoreError(f"{source} has no step yet, so nothing can be forked.")
    layout, table = ledger.at(begin)
    _check_empty(target)
    existed = target.is_dir()
    try:
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
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if existed:
            target.mkdir()
        if isinstance(error, OSError):
            raise StoreError(f"{target} must be a folder that can be written, got {error.strerror}.") from error
        raise
    with contextlib.suppress(OSError, ValueError):  # a trainer may have the log open, or the store is read-only
        _note(source, begin, manifest.life, target)
    return manifest


def shared_bytes(source: str | os.PathLike[str], step: int | None = None) -> int:
    """Bytes of the segments that a fork at a step uses."""
    ledger = Ledger(Path(source), Manifest.read(Path(source)))
    newest = ledger.manifest.newest
    if newest is None:
        return 0
    _, table = ledger.at(newest if step is None else step)
    files = ledger.files()
    return int(files["size"][np.isin(files["file"], table["file"])].sum())


def _check_empty(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise StoreError(f"target must be a new or empty folder, got {target}.")


def _link(ledger: Ledger, target: Path, numbers: list[int]) -> None:
    for place, number in enumerate(numbers):
        name = file_name(number)
        try:
            os.link(ledger.segments / name, target / SEGMENTS / name)
        except FileNotFoundError:
            raise StoreError(f"{ledger.segments / name} is missing; a trainer may have compacted meanwhile, so try again.") from None
        except OSError:  # another disk, or one without hard links
            if not place:
                need = sum((ledger.segments / file_name(one)).stat().st_size for one in numbers)
                free = shutil.disk_usage(target).free
                if need > free:
                    raise StoreError(f"{target} needs {need:,} bytes for copies of the segments, and its disk has {free:,}.") from None
            shutil.copyfile(ledger.segments / name, target / SEGMENTS / name)
            sync(target / SEGMENTS / name)


def _copy_logs(source: Path, target: Path, life: str) -> None:
    logs = {path.name: path for path in (source / PARENTS).glob("*.jsonl")}
    if (source / LOG).is_file():
        logs[f"{life}.jsonl"] = source / LOG
    if logs:
        (target / PARENTS).mkdir(exist_ok=True)
    for name, path in logs.items():
        shutil.copyfile(path, target / PARENTS / name)


def _note(source: Path, step: int, life: str, target: Path) -> None:
    """Writes the fork into the parent's log, if no trainer has it open; the child's own log has it in any case."""
    try:
        lock = lock_file(source / ".lock")
    except BlockingIOError:
        return
    try:
        with LifeLog(source / LOG) as log:
            log.append("fork", step, durable=True, child=life, folder=str(target.resolve()))
    finally:
        os.close(lock)
