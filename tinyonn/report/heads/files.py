"""Files of the `heads` commands: tables with one line per head, and facts of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ...errors import InputError, listed, reason
from ..html.page import short_digest
from ..scan.grid import Floats


@dataclass(frozen=True)
class HeadColumns:
    """A CSV with one line per head.

    Attributes:
        layers: label of each row of a grid.
        places: (lines,) (layer, head) in the file's order.
        columns: (lines,) numbers by column, in the file's order; NaN for an empty cell.
        words: (lines,) text by column.
    """

    layers: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    columns: dict[str, Floats]
    words: dict[str, list[str]]

    @property
    def num_heads(self) -> int:
        """Largest number of heads of a layer."""
        return max(head for _, head in self.places) + 1

    def grid(self, name: str) -> Floats:
        """One column as (layers, heads); NaN for a head that the layer lacks."""
        rows = {int(label): row for row, label in enumerate(self.layers)}
        out = np.full((len(self.layers), self.num_heads), np.nan)
        for (layer, head), value in zip(self.places, self.columns[name], strict=True):
            out[rows[layer], head] = value
        return out


def read_heads(path: Path, names: Sequence[str], step: str, words: Sequence[str] = ()) -> HeadColumns:
    """Reads a CSV with the columns layer and head.

    Args:
        path: the file.
        names: required numeric columns; others are read as well.
        step: command that writes the file.
        words: required text columns.

    Raises:
        InputError: the file is missing, has no lines, lacks a column, or a cell is not a number; the message names the file and the step.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, head = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        raise InputError(f"{path} must exist, got no such file; run {step}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {reason(error, 100)}; run {step} again.") from error
    wanted = ["layer", "head", *names, *words]
    if not set(wanted) <= set(head):
        raise InputError(f"{path} must have the columns {', '.join(wanted)}, got {listed(head)}; run {step} again.")
    if not rows:
        raise InputError(f"{path} must have a line for every head, got no lines; run {step} again.")
    try:
        places = tuple((int(row["layer"]), int(row["head"])) for row in rows)
        numeric = [name for name in head if name not in ("layer", "head", *words)]
        columns = {name: np.array([float(row[name]) if row[name] else math.nan for row in rows]) for name in numeric}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} must hold numbers: {reason(error, 100)}; run {step} again.") from error
    if len(set(places)) < len(places) or min(min(place) for place in places) < 0:
        raise InputError(f"{path} must list each head once, counted from 0; run {step} again.")
    layers = tuple(str(layer) for layer in sorted({layer for layer, _ in places}))
    return HeadColumns(layers, places, columns, {name: [row[name] or "" for row in rows] for name in words})


def plain_facts(values: dict[str, Any]) -> dict[str, object]:
    """Single values of a run's JSON file for a list of facts: digests and paths shortened, versions joined, lists left out."""
    shown: dict[str, object] = {}
    for key, value in values.items():
        name = str(key).replace("_", " ")
        if isinstance(value, bool):
            shown[name] = "yes" if value else "no"
        elif isinstance(value, str):
            path = PurePath(value)
            last_parts = "/".join(("…", *path.parts[-2:])) if path.is_absolute() and len(path.parts) > 3 else value
            shown[name] = short_digest(value) or last_parts
        elif isinstance(value, int | float):
            shown[name] = value
        elif key == "versions" and isinstance(value, dict):
            shown[name] = ", ".join(f"{package} {version}" for package, version in value.items())
    return shown


def option_facts(options: dict[str, Any]) -> dict[str, object]:
    """Options of a run as on the command line, for a list of facts."""
    return {f"--{name.replace('_', '-')}": value for name, value in plain_facts(options).items()}
