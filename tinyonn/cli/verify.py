"""`tinyonn verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._io.units import readable_bytes
from . import screen


def verify(
    files: Annotated[list[Path], typer.Argument(help="Files, or names of sets of ranks.", show_default=False)],
) -> None:
    """Check .mscan files against all rules of the format: checksums, order, commits of sequences.

    The exit code is 1 if a file is damaged.
    """
    from ..mscan.convert import verify as check

    damaged = 0
    for file in files:
        with screen.Progress(f"checking {file.name}"):
            found = check(file)
        holds = f"{screen.counted(found.sequences, 'sequence')}, {screen.counted(found.tokens, 'token')}, {readable_bytes(found.size)}"
        if found.failure is None:
            print(f"ok       {file}: version {found.version}, {holds}")
            continue
        damaged += 1
        where = "" if found.failure.offset is None else f" at byte {found.failure.offset}"
        print(f"DAMAGED  {file}{where}: {' '.join(found.failure.rule.split())}")
        if found.sequences:
            fixed = file.with_suffix(f".recovered{file.suffix}")
            print(f"         `tinyonn recover {file} -o {fixed}` keeps {screen.counted(found.sequences, 'sequence')}")
        else:
            print("         no sequence can be read")
    if damaged:
        raise typer.Exit(1)
