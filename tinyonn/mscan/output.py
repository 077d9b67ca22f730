"""Outputs that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .opening import rank_members

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Args:
        path: the output.
        sequences, tokens: how many it holds.
        dropped: what the source held or should have held and the output does not, one sentence each.
    """

    path: Path
    sequences: int
    tokens: int
    dropped: list[str] = field(default_factory=list)


@contextmanager
def replacing(output: PathLike, overwrite: bool, sources: Iterable[PathLike] = ()) -> Iterator[Path]:
    """A name beside `output` to write to; renamed to it when the block ends well, removed when not.

    Raises:
        InputError: `output` exists and shall not be replaced, is no regular file, or is one of `sources` or of their sets of ranks.
    """
    target = Path(output)
    if target.exists():
        if not target.is_file():
            raise InputError(f"output must be a file, got a folder, pipe or device: {target}.")
        names = [os.fspath(source) for source in sources]
        if any(target.samefile(member) for name in names for member in rank_members(name) or [name]):
            raise InputError(f"output must be another file than the source, got {target}.")
    if target.exists() and not overwrite:
        raise InputError(f"output must not exist yet, got {target}; --overwrite replaces it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
