"""Columns of a scan: the weight and the feature block of each column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One weight: its blocks are columns base … base + blocks of both planes.

    Attributes:
        name: the parameter's name, with the expert's index appended for an expert of a 3-D parameter.
        out_features: output features of the weight.
        blocks: number of feature blocks; the last may be shorter.
        base: first column.
    """

    name: str
    out_features: int
    blocks: int
    base: int


def layout_blocks(layout: Sequence[LayoutEntry]) -> int:
    """Number of columns of a layout."""
    return layout[-1].base + layout[-1].blocks if layout else 0


def check_layout(layout: Sequence[LayoutEntry]) -> None:
    """Raises InputError unless names are unique and the columns follow each other without a gap."""
    if not layout:
        raise InputError("layout must hold at least one entry, got none.")
    seen: set[str] = set()
    base = 0
    for entry in layout:
        numbers = (entry.out_features, entry.blocks, entry.base)
        if not isinstance(entry.name, str) or not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
            raise InputError(f"layout entries must be a name and three integers below 2^63, got {entry}.")
        if any("\ud800" <= character <= "\udfff" for character in entry.name):
            raise InputError(f"layout names must be valid Unicode, got {entry.name!r}.")
        if entry.name in seen:
            raise InputError(f"layout names must be unique, got {entry.name!r} twice.")
        if not 1 <= entry.blocks <= entry.out_features:
            raise InputError(f"blocks of {entry.name!r} must be 1 … out_features = {entry.out_features}, got {entry.blocks}.")
        if entry.base != base:
            raise InputError(f"base of {entry.name!r} must be {base}, the end of the entry before it, got {entry.base}.")
        seen.add(entry.name)
        base += entry.blocks


def group_name(name: str) -> str:
    """Decoder layer of a weight: its name up to the first all-digit component, or the module's name if it is in no layer."""
    match = _LAYER.match(name)
    return match.group(0) if match else name.removesuffix(".weight")


def layer_count(groups: Sequence[str]) -> int:
    """Number of groups that are decoder layers; the others are weights outside all layers."""
    return sum(group.rpartition(".")[2].isdigit() for group in groups)


def layout_groups(layout: Sequence[LayoutEntry]) -> tuple[list[str], np.ndarray]:
    """One group of columns per decoder layer.

    Args:
        layout: entries in column order.

    Returns:
        names: one per group, such as `model.layers.0`; a weight outside all layers is its own group, such as `lm_head`.
        offsets: (groups + 1,) int64, first column of each group, then the total.

    Raises:
        InputError: a group's entries are not next to each other.
    """
    names: list[str] = []
    offsets: list[int] = []
    for entry in layout:
        name = group_name(entry.name)
        if names and names[-1] == name:
            continue
        if name in names:
            raise InputError(f"layout must keep the weights of one layer together, got {entry.name!r} apart from the rest of {name!r}.")
        names.append(name)
        offsets.append(entry.base)
    return names, np.array([*offsets, layout_blocks(layout)], dtype=np.int64)
