"""`tinyonn report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._io.units import readable_bytes
from . import screen
from .options import Figures

if TYPE_CHECKING:
    from ..report import ComparisonResult, ReportResult


def report(
    file: Annotated[Path, typer.Argument(help="A .mscan file.", show_default=False)],
    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", "-o", metavar="PATH", help="The page. [default: FILE with .html]", show_default=False),
    ] = None,
    normalise: Annotated[str, typer.Option(metavar="layer|global|none", help="Normalisation of the maps at first.")] = "layer",
    top: Annotated[int, typer.Option(metavar="N", help="Number of blocks and heads listed.")] = 20,
    replay: Annotated[int, typer.Option(metavar="N", help="Number of sequences shown token by token.")] = 8,
    replay_order: Annotated[
        str, typer.Option(metavar="ORDER", help="Choice of these sequences: surprising (highest loss) or first.")
    ] = "surprising",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder of the model whose tokenizer decodes the tokens. [default: the scan's]", show_default=False
        ),
    ] = None,
    figures: Figures = True,
) -> None:
    """Write a page about a scan: maps, top blocks and heads, replay of tokens.

    The page is one file and opens offline.
    """
    from ..report import write_report
    from ..report.scan.figures import require_matplotlib

    if figures:
        require_matplotlib("--no-figures")
    target = output_path or file.with_suffix(".html")
    with screen.Progress(f"reading {file.name}"):
        result = write_report(
            file,
            target,
            normalise=normalise,  # type: ignore[arg-type]  # checked by write_report
            top=top,
            replay=replay,
            replay_order=replay_order,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            figures_too=figures,
        )
    print(screen.rows(written(result)))


def written(result: ReportResult | ComparisonResult) -> list[tuple[str, object]]:
    """Files of a page, with its size."""
    return [("page", f"{result.html}, {readable_bytes(result.html.stat().st_size)}"), *(("figure", png) for png in result.pngs)]
