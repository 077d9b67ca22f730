"""`tinyonn convert`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import screen
from .options import Output, Overwrite, takes_coding
from .recover import written

if TYPE_CHECKING:
    from ..mscan.convert import Conversion


class Target(StrEnum):
    """Formats of a conversion."""

    mscan = "mscan"
    parquet = "parquet"
    npz = "npz"


@takes_coding
def convert(
    files: Annotated[list[Path], typer.Argument(help="One file, a set of ranks, or several files to merge.", show_default=False)],
    output_path: Output,
    to: Annotated[Target | None, typer.Option(help="Format of the output. [default: by its suffix]", show_default=False)] = None,
    *,
    given: Mapping[str, Any],
    overwrite: Overwrite = False,
) -> None:
    """Convert version 1 to 2, merge files, or export a scan.

    Without --codec, a .mscan keeps the codec of its source, and values of version 1 become f32. Parquet has a row for each token and
    block; npz holds the planes as arrays.
    """
    from ..mscan import MscanReader
    from ..mscan.convert import convert_v1, merge

    target = to or _by_suffix(output_path)
    with screen.Progress(f"reading {files[0].name}"):
        if target is not Target.mscan:
            result = _export(files, output_path, target, given, overwrite)
        else:
            with MscanReader(files[0]) as reader:
                old = reader.version == 1
            if old and len(files) == 1:
                result = convert_v1(files[0], output_path, overwrite=overwrite, **given)
            else:
                result = merge(files, output_path, overwrite=overwrite, **given)
    print(written(result))


def _by_suffix(output: Path) -> Target:
    suffix = output.suffix.removeprefix(".").lower()
    if suffix not in {target.value for target in Target}:
        raise InputError(f"output must end in .mscan, .parquet or .npz, or --to must name its format, got {output}.")
    return Target(suffix)


def _export(files: list[Path], output: Path, target: Target, coding: Mapping[str, str], overwrite: bool) -> Conversion:
    from ..mscan.export import to_npz, to_parquet

    if len(files) > 1:
        raise InputError(f"an export to {target.value} must have one source, got {len(files)}; merge them first, into a .mscan.")
    if coding:
        raise InputError(f"--codec and --compression must be left out of an export to {target.value}, got {', '.join(coding.values())}.")
    write = to_parquet if target is Target.parquet else to_npz
    return write(files[0], output, overwrite=overwrite)
