"""Grids of ARC as SVG, in ARC's colours (assets/arc.css)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ..html.page import text

LARGEST_CELL, LARGEST_GRID = 22.0, 176.0  # pixels

Cells = Sequence[Sequence[int]]


def cell_size(grids: Sequence[Cells]) -> float:
    """Pixels of a cell, the same for all of these grids, so that their sizes compare."""
    longest = max(max(len(grid), len(grid[0])) for grid in grids)
    return min(LARGEST_CELL, LARGEST_GRID / longest)


def grid_svg(grid: Cells, label: str, cell: float) -> str:
    """A picture of a grid.

    Args:
        grid: rows of colours 0–9.
        label: what it is, for readers that hear the page.
        cell: pixels of a cell.
    """
    rows, columns = len(grid), len(grid[0])
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        x = 0
        for colour, run in groupby(row):
            width = len(list(run))
            paths.setdefault(colour, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    cells = "".join(f'<path class="c{int(colour)}" d="{"".join(parts)}"/>' for colour, parts in sorted(paths.items()))
    lines = "".join(f"M0 {y}h{columns}" for y in range(rows + 1)) + "".join(f"M{x} 0v{rows}" for x in range(columns + 1))
    size = f'width="{columns * cell:.4g}" height="{rows * cell:.4g}" viewBox="0 0 {columns} {rows}"'
    named = text(f"{label}, {rows} × {columns}")
    return f'<svg class="arc" role="img" aria-label="{named}" {size}>{cells}<path class="lines" d="{lines}"/></svg>'
