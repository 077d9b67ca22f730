"""Outputs that are complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .._io.files import check_output
from .opening import rank_members

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """Result of writing a file.

    Args:
        path: the output.
        sequences, tokens: number of sequences and tokens in it.
        dropped: one sentence for each part of the source that the output lacks.
    """

    path: Path
    sequences: int
    tokens: int
    dropped: list[str] = field(default_factory=list)


@contextmanager
def replacing(output: PathLike, overwrite: bool, sources: Iterable[PathLike] = ()) -> Iterator[Path]:
    """Temporary path next to `output`; renamed to `output` if the block succeeds, removed otherwise.

    Raises:
        InputError: `output` exists and `overwrite` is False, is not a regular file, or is one of `sources` or of their sets of ranks.
    """
    target = Path(output)
    names = [os.fspath(source) for source in sources] if target.is_file() else []
    check_output(target, [member for name in names for member in rank_members(name) or [name]], overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
