"""The log in a store: a damaged one is set aside, so that it does not keep an intact store from being used."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .life_log import LOG, LifeLog, LifeLogError, LogEnd
from .manifest import Manifest


def open_log(folder: Path, manifest: Manifest, checked: LogEnd | None = None) -> LifeLog:
    """Opens the log of a store. A new one begins with a record of the life; a damaged one is renamed, and the new one names it.

    Args:
        folder, manifest: of the store.
        checked: up to where the log need not be checked.

    Raises:
        InputError: the log cannot be written.
    """
    path, fields = folder / LOG, {}
    try:
        log = LifeLog(path, checked)
    except LifeLogError as error:
        aside = _free_name(path)
        os.rename(path, aside)
        warnings.warn(f"{error} It is renamed to {aside.name}, and a new log begins.", stacklevel=2)
        log, fields = LifeLog(path), {"damaged": aside.name}
    if not log.number:
        log.append("begin", manifest.newest or 0, durable=True, life=manifest.life, parent=manifest.parent, **fields)
    return log


def _free_name(path: Path) -> Path:
    number = 1
    while (found := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    return found
