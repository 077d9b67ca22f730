"""Blocks of a layout arranged as a grid of layers and modules.

    cell(layer, module) = all feature blocks of that module in that layer; the experts of one layer share a cell

A map of single blocks would have 10⁵ cells or more, too many for a screen; layers × modules fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...mscan import LayoutEntry, layout_groups

FEATURES_PER_BLOCK = 64
OUTSIDE = "outside layers"
PLACE_COLUMNS = ("layer", "module", "features")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockGrid:
    """Position of each block.

    Attributes:
        layout: the weights, in column order.
        layers: label of each row; a bare number if the model has one stack of layers.
        groups: full name of each row's group of weights.
        modules: name of each column: path of the weight inside its layer, without expert numbers.
        layer_offsets: (rows + 1,) first block of each row.
        cell: (blocks,) row · columns + column.
        entry: (blocks,) index of the weight in `layout`.
    """

    layout: tuple[LayoutEntry, ...]
    layers: tuple[str, ...]
    groups: tuple[str, ...]
    modules: tuple[str, ...]
    layer_offsets: Ints
    cell: Ints
    entry: Ints

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.modules)

    @property
    def num_blocks(self) -> int:
        return len(self.cell)

    def sum(self, values: Floats) -> Floats:
        """Sums (blocks,) into (rows, columns); missing values are skipped, cells without values are NaN."""
        present = np.isfinite(values)
        size = self.shape[0] * self.shape[1]
        total = np.bincount(self.cell[present], weights=values[present], minlength=size)
        filled = np.bincount(self.cell[present], minlength=size) > 0
        return np.where(filled, total, np.nan).reshape(self.shape)

    def mean(self, values: Floats, weights: Floats) -> Floats:
        """Weighted means of (blocks,) as (rows, columns); cells without weight are NaN."""
        known = np.isfinite(values) & (weights > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sum(np.where(known, values * weights, np.nan)) / self.sum(np.where(known, weights, np.nan))

    def token_means(self, values: npt.NDArray[np.floating]) -> Floats:
        """Means over the blocks of each cell: (tokens, blocks) to (tokens, rows · columns); missing values are skipped."""
        order = np.argsort(self.cell, kind="stable")
        cells, starts = np.unique(self.cell[order], return_index=True)
        ordered = np.asarray(values, dtype=np.float64)[:, order]
        present = np.isfinite(ordered)
        out = np.full((len(ordered), self.shape[0] * self.shape[1]), np.nan)
        if len(ordered) and len(starts):
            total = np.add.reduceat(np.where(present, ordered, 0.0), starts, axis=1)
            count = np.add.reduceat(present.astype(np.int64), starts, axis=1)
            out[:, cells] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return out

    def block_place(self, block: int) -> BlockPlace:
        """Layer, weight and feature range of one block."""
        entry = self.layout[int(self.entry[block])]
        first = (block - entry.base) * FEATURES_PER_BLOCK
        row = int(self.cell[block]) // self.shape[1]
        return BlockPlace(
            layer=self.layers[row],
            module=_inside(entry.name, self.groups[row], keep_numbers=True) or entry.name.removesuffix(".weight"),
            parameter=entry.name,
            first=first,
            last=max(first, min(first + FEATURES_PER_BLOCK, entry.out_features) - 1),
        )


@dataclass(frozen=True)
class BlockPlace:
    """Names of a block: layer label, module inside the layer, weight, and its features first … last."""

    layer: str
    module: str
    parameter: str
    first: int
    last: int

    @property
    def cells(self) -> tuple[str, str, str]:
        """Cells of the block in a table, for PLACE_COLUMNS."""
        return self.layer, self.module, f"{self.first}–{self.last}"


def build_grid(layout: Sequence[LayoutEntry]) -> BlockGrid:
    """Arranges a layout as layers × modules.

    Raises:
        InputError: the layout is empty, or its groups are not contiguous.
    """
    if not layout:
        raise InputError("layout must hold at least one weight, got none.")
    groups, offsets = layout_groups(list(layout))
    blocks = int(offsets[-1])
    row = np.repeat(np.arange(len(groups)), np.diff(offsets))
    entry = np.empty(blocks, dtype=np.int64)
    column = np.empty(blocks, dtype=np.int64)
    modules: dict[str, int] = {}
    for number, weight in enumerate(layout):
        span = slice(weight.base, weight.base + weight.blocks)
        entry[span] = number
        if weight.blocks:
            name = _inside(weight.name, groups[int(row[weight.base])], keep_numbers=False) or OUTSIDE
            column[span] = modules.setdefault(name, len(modules))
    # Weights outside the layers are in the last column, in any order of the model.
    names = sorted(modules, key=lambda name: (name == OUTSIDE, modules[name]))
    place = np.empty(len(names), dtype=np.int64)
    for new, name in enumerate(names):
        place[modules[name]] = new
    return BlockGrid(
        layout=tuple(layout),
        layers=_row_labels(groups),
        groups=tuple(groups),
        modules=tuple(names),
        layer_offsets=np.asarray(offsets, dtype=np.int64),
        cell=row * len(names) + place[column],
        entry=entry,
    )


def even_sample(total: int, limit: int) -> Ints:
    """At most `limit` of the numbers 0 … total − 1, evenly spaced."""
    return np.arange(total) if total <= limit else np.linspace(0, total - 1, limit).astype(np.int64)


def outside_terms(grid: BlockGrid) -> dict[str, str]:
    """Definition of the column of weights outside the layers, with some of their names; empty without such weights."""
    if OUTSIDE not in grid.modules:
        return {}
    column, width = grid.modules.index(OUTSIDE), grid.shape[1]
    found = [grid.layout[number].name.removesuffix(".weight") for number in dict.fromkeys(grid.entry[grid.cell % width == column].tolist())]
    names = ", ".join(found[:3]) + (f" and {len(found) - 3:,} more" if len(found) > 3 else "")
    return {OUTSIDE: f"weights that belong to no layer of the stack, here {names}. Each has its own row."}


def short_names(names: Sequence[str]) -> list[str]:
    """Last path component of each name, with as many parents as needed to distinguish them."""
    parts = [name.split(".") for name in names]
    short = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        short.append(".".join(own[-depth:]))
    return short


def _inside(name: str, group: str, *, keep_numbers: bool) -> str:
    """Path of a weight inside its layer; empty for a weight that forms its own group."""
    rest = name.removesuffix(".weight")
    rest = rest[len(group) :].lstrip(".") if rest.startswith(group) else rest
    return rest if keep_numbers else ".".join(part for part in rest.split(".") if not part.isdigit())


def _row_labels(groups: Sequence[str]) -> tuple[str, ...]:
    stacks = {group.rpartition(".")[0] for group in groups if group.rpartition(".")[2].isdigit()}
    if len(stacks) == 1:
        return tuple(group.rpartition(".")[2] if group.rpartition(".")[0] in stacks else group for group in groups)
    return tuple(groups)
