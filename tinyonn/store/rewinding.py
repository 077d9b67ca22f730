"""Going back to an earlier step of a store, without its model; also where the newest manifest or segment is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._io.files import sync
from .._io.locks import lock_file
from .closing import take_note
from .errors import DamagedStoreError, StoreError
from .ledger import Ledger
from .logs import open_log
from .manifest import NAME, PREVIOUS, Manifest
from .segment import Files

HINTS = 3  # steps that a hint reads, each of which may be as large as the whole state


def rewind(folder: str | os.PathLike[str], step: int | None = None) -> int:
    """Makes a kept step the newest one. Steps after it are forgotten; `fork` keeps them elsewhere first.

    Where the manifest is damaged or missing, the one before it is used.

    Args:
        folder: a store that no trainer uses.
        step: a kept step; None for the newest.

    Returns:
        The step that is the newest now.

    Raises:
        StoreError: the step is not kept or damaged; the store is in use or cannot be written.
    """
    folder = Path(folder)
    with editing(folder, recover=True) as ledger:
        assert ledger is not None
        manifest = ledger.manifest
        wanted = manifest.newest if step is None else step
        if wanted is None:
            raise StoreError(f"{folder} has no step yet.")
        check_step(ledger, wanted)
        before = manifest.newest
        with open_log(folder, manifest) as log:
            ledger.rewind(wanted)
            log.append("restore", wanted, durable=True, newest=before)
    return wanted


@contextmanager
def editing(folder: Path, *, required: bool = True, recover: bool = False) -> Iterator[Ledger | None]:
    """Locks a store that no trainer uses.

    Args:
        folder: a store.
        recover: whether to use the manifest before one that is damaged or missing.
        required: whether a store in use is an error; otherwise the block gets None.

    Raises:
        StoreError: it is in use or cannot be written.
    """
    try:
        lock = lock_file(folder / ".lock")
    except BlockingIOError:
        if not required:
            yield None
            return
        raise StoreError(f"{folder} must be a store that no other run writes into; stop that run first.") from None
    except OSError as error:
        raise StoreError(f"{folder} must be a store that can be written, got {error.strerror}.") from error
    try:
        manifest = recovered(folder) if recover else Manifest.read(folder)
        take_note(folder)
        yield Ledger(folder, manifest)
    finally:
        os.close(lock)


def recovered(folder: Path) -> Manifest:
    """The manifest, or the one before it if that one is damaged or missing; then it takes its place.

    Raises:
        StoreError: neither can be read; the manifest is of a newer version.
    """
    previous = folder / PREVIOUS
    if (folder / NAME).exists():
        try:
            return Manifest.read(folder)
        except DamagedStoreError:
            if not previous.exists():
                raise
    if not previous.exists():
        return Manifest.read(folder)
    manifest = Manifest.read(folder, PREVIOUS)
    os.replace(previous, folder / NAME)
    sync(folder)
    return manifest


def check_step(ledger: Ledger, step: int) -> None:
    """Reads all of a step.

    Raises:
        StoreError: the step is not kept.
        DamagedStoreError: a chunk of it is damaged.
    """
    layout, table = ledger.at(step)
    files = Files(ledger.segments)
    for place, name in zip(table, layout.names, strict=True):
        files.checked(place, name)


def go_back_hint(ledger: Ledger, step: int) -> str:
    """How a message on a damaged step ends: the last step before it that is whole, if it is among the newest `HINTS`."""
    before = [one for one in ledger.manifest.kept if one < step]
    for earlier in before[: -HINTS - 1 : -1]:
        try:
            check_step(ledger, earlier)
        except StoreError:
            continue
        return f" Step {earlier} is whole: `tinyonn life restore {ledger.folder} --step {earlier}` goes back to it."
    if len(before) <= HINTS:
        return " No earlier step is kept whole."
    return f" The {HINTS} steps before it are damaged too; `tinyonn life verify {ledger.folder}` lists those that are whole."
