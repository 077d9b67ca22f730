"""The note that a store leaves when it is closed without an error: what the next opening need not check.

    closed.json   a line of JSON, and a line with its checksum
        manifest  checksum of manifest.json; with another manifest, files may be left that nobody needs
        log       where the log of the life ends: bytes, number, checksum and time of the last record

Opening a store removes the note, so after a crash everything is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .._io.files import sync
from .errors import DamagedStoreError, StoreError
from .layout import digest, hex_digest
from .life_log import LogEnd
from .manifest import NAME

CLOSED = "closed.json"
CHECKED = 2**16  # bytes up to which a log is checked whole at each opening


@dataclass(frozen=True)
class ClosingNote:
    """Where the manifest and the log were when the store was closed.

    Attributes:
        manifest: its checksum, in hexadecimal.
        log: its end.
    """

    manifest: str
    log: LogEnd

    @property
    def checked(self) -> LogEnd | None:
        """Up to where a log need not be checked; None for a short one."""
        return self.log if self.log.size > CHECKED else None

    def holds(self, folder: Path) -> bool:
        """Whether the manifest is as it was."""
        return self.manifest == _checksum(folder)


def leave_note(folder: Path, log: LogEnd) -> None:
    """Writes the note; without one, as on a full disk, the next opening checks everything.

    Args:
        folder: the store, which has no file that nobody needs.
        log: the end of the log, of which all is on the disk.
    """
    if log.time is None:
        return
    line = json.dumps({"manifest": _checksum(folder), "log": [*log[:3], log.time.isoformat()]})
    partial = folder / f".{CLOSED}.new"
    try:
        partial.write_text(f"{line}\n{hex_digest(digest(line.encode()))}\n")
        sync(partial)  # so that after a power cut there is the whole note or none
        os.replace(partial, folder / CLOSED)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def take_note(folder: Path) -> ClosingNote | None:
    """Reads the note and removes it; None if there is none that is whole.

    Raises:
        StoreError: it cannot be removed.
    """
    found = None
    with contextlib.suppress(DamagedStoreError):
        found = read_note(folder)
    try:
        if (folder / CLOSED).exists():
            (folder / CLOSED).unlink(missing_ok=True)  # another process of a training may do the same
            sync(folder)  # a power cut must not bring it back
    except OSError as error:
        raise StoreError(f"{folder} must be a store that can be written, got {error.strerror}.") from error
    return found


def read_note(folder: Path) -> ClosingNote | None:
    """The note; None if there is none.

    Raises:
        DamagedStoreError: it is damaged.
    """
    path = folder / CLOSED
    try:
        line, _, rest = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedStoreError(f"{path} cannot be read: {error.strerror}.") from error
    if rest != f"{hex_digest(digest(line))}\n".encode():
        raise DamagedStoreError(f"{path} is damaged.")
    try:
        found = json.loads(line)
        size, number, crc, time = found["log"]
        return ClosingNote(found["manifest"], LogEnd(size, number, crc, datetime.fromisoformat(time)))
    except (ValueError, KeyError, TypeError):  # of another version
        raise DamagedStoreError(f"{path} must have a manifest and a log, got others; the next opening removes it.") from None


def _checksum(folder: Path) -> str:
    return hex_digest(digest((folder / NAME).read_bytes()))
