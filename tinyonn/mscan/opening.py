"""Version of the file at a path, or the set of files that it belongs to."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..errors import MscanError
from .v1.header import PROLOGUE, read_prologue

# Name of one file of a set.
RANK = re.compile(r"(?P<stem>.+)\.rank(?P<rank>\d+)-of-(?P<size>\d+)\.mscan")


def version_of(path: str) -> int:
    """The version in a file's first 15 bytes.

    Raises:
        MscanError: they do not belong to a `.mscan` file of version 1 or 2, or the path is a pipe.
    """
    status = os.stat(path)  # before it is opened: opening a pipe waits for a writer
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise MscanError(path, "a .mscan file must be a file, got a pipe or device.")
    if path != path.encode(errors="replace").decode():
        raise MscanError(path, "the path of a .mscan file must be Unicode.")
    with open(path, "rb") as file:
        return read_prologue(path, file.read(PROLOGUE.size))[0]


def rank_members(path: str) -> list[str] | None:
    """Files of the set that `path` belongs to or names, in rank order; None for a single file.

    Raises:
        MscanError: a member is missing, or sets of different sizes share this name.
    """
    place = Path(path)
    match = RANK.fullmatch(place.name)
    if match:
        stem, sizes = match["stem"], {int(match["size"])}
    elif place.exists() or place.suffix != ".mscan" or not place.parent.is_dir():
        return None
    else:
        stem = place.stem
        found = (RANK.fullmatch(name) for name in os.listdir(place.parent))
        sizes = {int(member["size"]) for member in found if member and member["stem"] == stem}
        if not sizes:
            return None
    if len(sizes) > 1:
        raise MscanError(path, f"a set must have one size, got {stem}.rankI-of-N.mscan for N = {', '.join(map(str, sorted(sizes)))}.")
    size = sizes.pop()
    names = [place.with_name(f"{stem}.rank{rank}-of-{size}.mscan") for rank in range(size)]
    if match and int(match["rank"]) >= size:
        raise MscanError(path, f"a set of {size} files must have ranks 0 … {size - 1}, got {match['rank']}.")
    for name in names:
        if not name.exists():
            raise MscanError(path, f"a set must be complete: {name.name} is missing.")
    return [os.fspath(name) for name in names]
