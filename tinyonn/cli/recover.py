"""`tinyonn recover`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._io.units import readable_bytes
from . import screen
from .options import Output, Overwrite, takes_coding

if TYPE_CHECKING:
    from ..mscan.convert import Conversion


@takes_coding
def recover(
    file: Annotated[Path, typer.Argument(help="The damaged file, which is not changed.", show_default=False)],
    output_path: Output,
    given: Mapping[str, Any],
    overwrite: Overwrite = False,
) -> None:
    """Copy the readable sequences of a damaged file to a new one.

    Without --codec, values keep the codec of the file, and those of version 1 become f32.
    """
    from ..mscan.convert import recover as repair

    with screen.Progress(f"reading {file.name}"):
        result = repair(file, output_path, overwrite=overwrite, **given)
    print(written(result))


def written(result: Conversion) -> str:
    """Summary of a conversion: sequences written, and sequences lost."""
    lines: list[tuple[str, object]] = [
        ("written", f"{result.path}, {readable_bytes(result.path.stat().st_size)}"),
        ("holds", f"{screen.counted(result.sequences, 'sequence')}, {screen.counted(result.tokens, 'token')}"),
    ]
    return screen.rows(lines + [("lost" if index == 0 else "", text) for index, text in enumerate(result.dropped)])
