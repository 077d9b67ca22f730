"""`tinyonn compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import screen
from .options import Figures
from .report import written

LISTED = 5


def compare(
    a: Annotated[Path, typer.Argument(help="A .mscan file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another, of the same model and options.", show_default=False)],
    output_path: Annotated[Path, typer.Option("--output-path", "-o", metavar="PATH", help="The page.")] = Path("compare.html"),
    top: Annotated[int, typer.Option(metavar="N", help="Number of blocks listed on the page.")] = 20,
    resamples: Annotated[int, typer.Option(metavar="N", help="Number of bootstrap resamples.")] = 2000,
    confidence: Annotated[float, typer.Option(metavar="X", help="Confidence level of all intervals together.")] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the resampling.")] = 0,
    figures: Figures = True,
) -> None:
    """Write a page about the differences between two topics.

    It has difference maps, rank correlation, and the blocks specific to one topic, with bootstrap intervals over sequences.
    """
    from ..report import write_comparison
    from ..report.scan.figures import require_matplotlib

    if figures:
        require_matplotlib("--no-figures")
    with screen.Progress(f"comparing {a.name} and {b.name}"):
        result = write_comparison(a, b, output_path, top=top, resamples=resamples, confidence=confidence, seed=seed, figures_too=figures)
    blocks = result.specific_blocks
    lines: list[tuple[str, object]] = [
        ("compared", f"{screen.number(result.sequences_a)} and {screen.counted(result.sequences_b, 'sequence')}"),
        (
            "rank correlation",
            f"{result.rank_correlation:.3f} ({result.split_half_a:.3f} and {result.split_half_b:.3f} between halves of one)",
        ),
        ("specific blocks", f"{screen.number(len(blocks))} of {screen.number(result.tested_blocks)}"),
    ]
    shown = "\n".join(f"{block.parameter} {block.first}-{block.last}  {block.difference:+.3f}" for block in blocks[:LISTED])
    if shown:
        lines.append(("the largest", shown))
    print(screen.rows([*lines, *written(result)]))
