"""A task of ARC: demonstration pairs of grids, and test inputs whose outputs may be unknown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, listed, shown

Grid = np.ndarray  # (rows, columns) int8, read-only

MAX_SIDE, COLOURS = 30, 10
COLOUR_SET = frozenset(range(COLOURS))


class Pair(NamedTuple):
    """Attributes: input, output: (rows, columns) int8, colours 0–9; output is None where it is unknown."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
class Task:
    """A task of ARC. Grids may be given as lists or arrays; the task has its own copies, int8 and read-only.

    Two tasks are equal if they have the same name and the same grids in the same order.

    Attributes:
        name: its name in the data set.
        train: the demonstration pairs.
        test: the test pairs.

    Raises:
        InputError: a grid is ragged, empty, larger than 30 × 30 or has a colour outside 0–9, a demonstration has no output, or there are
            no demonstrations or test pairs. The message names the task.
    """

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", self._pairs(self.train, "demonstration", with_output=True))
        object.__setattr__(self, "test", self._pairs(self.test, "test pair", with_output=False))

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], kind: str, *, with_output: bool) -> tuple[Pair, ...]:
        found = []
        for number, (given, output) in enumerate(pairs, start=1):
            where = f"task {self.name}, {kind} {number}"
            if output is None and with_output:
                raise InputError(f"{where} must have an output, got none.")
            found.append(Pair(as_grid(given, f"{where}: input"), None if output is None else as_grid(output, f"{where}: output")))
        if not found:
            raise InputError(f"task {self.name} must have at least one {kind}, got none.")
        return tuple(found)

    @classmethod
    def from_json(cls, name: str, content: Any) -> Task:
        """A task from the parsed JSON of ARC's files: `{"train": [{"input": ..., "output": ...}], "test": [...]}`.

        Raises:
            InputError: the content has another form, or a grid is invalid; the message names the task.
        """
        if not isinstance(content, Mapping) or not {"train", "test"} <= content.keys():
            got = f"the fields {listed(content)}" if isinstance(content, Mapping) else f"{type(content).__name__} {shown(content, 40)}"
            raise InputError(f"task {name} must be a JSON object with train and test, got {got}.")
        parts = []
        for part in ("train", "test"):
            pairs = content[part]
            if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) and "input" in pair for pair in pairs):
                raise InputError(f"task {name}: {part} must be a list of pairs, each with an input, got {shown(pairs, 40)}.")
            parts.append(tuple(Pair(pair["input"], pair.get("output")) for pair in pairs))
        return cls(name, *parts)

    def to_json(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The task as ARC's files have it. An unknown output is left out."""
        parts = {"train": self.train, "test": self.test}
        return {
            part: [{key: grid.tolist() for key, grid in pair._asdict().items() if grid is not None} for pair in pairs]
            for part, pairs in parts.items()
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all grids in their order, without the name, in hexadecimal."""
        content = hashlib.sha256()
        for pairs in (self.train, self.test):
            content.update(len(pairs).to_bytes(4, "big"))
            for grid in (grid for pair in pairs for grid in pair):
                content.update(b"unknown" if grid is None else bytes(grid.shape) + grid.tobytes())
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and (self.name, self.digest) == (other.name, other.digest)

    def __hash__(self) -> int:
        return hash((self.name, self.digest))


def as_grid(value: Any, where: str) -> Grid:
    """A grid as (rows, columns) int8, a read-only copy.

    Args:
        value: lists of whole numbers, or an array of an integer type.
        where: beginning of messages, such as "task 007bbfb7, test pair 1: input".

    Raises:
        InputError: it is ragged, empty, larger than 30 × 30 or has a colour outside 0–9.
    """
    grid = value if isinstance(value, np.ndarray) else _array_of(value, where)
    if grid.ndim != 2 or grid.dtype.kind not in "iu":
        raise InputError(f"{where} must be a grid of whole numbers, got {grid.ndim}-d {grid.dtype}.")
    if not (1 <= grid.shape[0] <= MAX_SIDE and 1 <= grid.shape[1] <= MAX_SIDE):
        raise InputError(f"{where} must have 1 to {MAX_SIDE} rows and columns, got {grid.shape[0]} × {grid.shape[1]}.")
    outside = grid[(grid < 0) | (grid >= COLOURS)]
    if outside.size:
        raise InputError(f"{where} must have the colours 0 to {COLOURS - 1}, got {outside[0]}.")
    grid = grid.astype(np.int8)
    grid.setflags(write=False)
    return grid


def _array_of(value: Any, where: str) -> np.ndarray:
    """Lists as an array of Python's whole numbers, which have no largest one."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise InputError(f"{where} must be a list of rows, got {shown(value, 40)}.")
    for number, row in enumerate(value, start=1):
        if len(row) != len(value[0]):
            raise InputError(f"{where} must have rows of one length, got {len(value[0])} cells in row 1 and {len(row)} in row {number}.")
        if not set(map(type, row)) <= {int} or not COLOUR_SET.issuperset(row):
            strange = next(cell for cell in row if type(cell) is not int or cell not in COLOUR_SET)
            raise InputError(f"{where} must have the colours 0 to {COLOURS - 1}, got {shown(strange)} in row {number}.")
    return np.array(value, dtype=np.int64)
