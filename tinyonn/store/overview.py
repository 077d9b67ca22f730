"""What a store is, read without its model and without a lock."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreError
from .ledger import Ledger
from .life_log import LOG, LifeRecords, read_life_log
from .manifest import NAME, PREVIOUS, Manifest


@dataclass(frozen=True)
class Overview:
    """A store at a glance.

    Attributes:
        folder: of the store.
        life: UUID.
        parent: {"life": UUID, "step": step} of a fork; None otherwise.
        steps: restorable steps, in order.
        stored_bytes: on the disk; segments that a fork shares count in both.
        log: the log of the life.
    """

    folder: Path
    life: str
    parent: dict[str, Any] | None
    steps: list[int]
    stored_bytes: int
    log: LifeRecords


def find_store(folder: str | os.PathLike[str], name: str = "folder") -> Path:
    """The store in a folder: the folder itself, or `store` in it, as `tinyonn train` makes it.

    Args:
        folder: the folder.
        name: name of the argument that holds it, for messages.

    Raises:
        StoreError: there is none.
    """
    for one in (Path(folder), Path(folder) / "store"):
        if (one / NAME).exists() or (one / PREVIOUS).exists():
            return one
    raise StoreError(f"{name} must be a store or a folder with one, got {folder}, which has no {NAME}.")


def overview(folder: str | os.PathLike[str], name: str = "folder") -> Overview:
    """Reads the manifest and the log of a store; a trainer may run meanwhile.

    Args:
        folder: a store, or the folder of `tinyonn train`.
        name: name of the argument that holds it, for messages.

    Raises:
        StoreError: there is no store, or its manifest is damaged or of a newer version.
        InputError: the log is damaged.
    """
    found = find_store(folder, name)
    manifest = Manifest.read(found)
    log = read_life_log(found / LOG)
    return Overview(found, manifest.life, manifest.parent, manifest.kept, Ledger(found, manifest).stored_bytes(), log)


def newest_step(folder: str | os.PathLike[str]) -> int | None:
    """The newest step of a store; None if the folder has no store, or a store without a step.

    Raises:
        StoreError: the manifest is damaged or of a newer version.
    """
    return Manifest.read(Path(folder)).newest if _is_store(Path(folder)) else None


def saved_values(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The further values of the newest step, which `save` got as `state`; those that are tensors as None.

    Returns:
        The values; None if the folder has no store, or a store without a step.

    Raises:
        StoreError: the store is damaged or of a newer version.
    """
    from .segment import Files
    from .state import STATE, decoded

    path = Path(folder)
    if not _is_store(path):
        return None
    ledger = Ledger(path, Manifest.read(path))
    newest = ledger.manifest.newest
    if newest is None:
        return None
    layout, table = ledger.at(newest)
    text = bytes(Files(ledger.segments).checked(table[layout.numbers[STATE]], STATE)).decode()
    found: dict[str, Any] = decoded(json.loads(text)["extra"], {})
    return found


def _is_store(folder: Path) -> bool:
    """Whether a folder has a store.

    Raises:
        StoreError: its manifest is missing.
    """
    if (folder / NAME).exists():
        return True
    if (folder / PREVIOUS).exists():
        raise StoreError(f"{folder} has no {NAME}; `tinyonn life restore {folder}` brings back the one before it.")
    return False
