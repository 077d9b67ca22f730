"""Generated families of small tasks: a check of training and inference with small models, before ARC itself.

Each task has one rule of one family, such as "cells fall to the left". Its demonstrations determine the rule: every rule of every family
that explains them gives the same output for the test input.

    copy      the input itself
    mirror    left and right, top and bottom, or rows and columns exchanged
    recolour  one colour becomes another
    fill      black cells that other cells enclose get a colour
    gravity   cells fall to one of the four sides
    crop      the smallest rectangle with all cells of a colour
    count     a row with as many cells as the input has of a colour
    compose   a mirror or gravity, then a change of colour
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from ..errors import InputError, did_you_mean, shown
from .tasks import COLOURS, MAX_SIDE, Grid, Pair, Task

Rng = np.random.Generator
Move = Callable[[Grid], Grid | None]
Draw = Callable[[Rng, int, int], Grid]

MOST_COUNTED = 6  # cells in the output of count


@dataclass(frozen=True)
class Rule:
    """What turns an input into its output: a move of cells, and perhaps a change of one colour after it.

    Attributes:
        move: gives a grid, or None for an input to which it does not apply.
        draw: draws an input of (rows, columns) that suits the rule.
        change: the old colour and the new one; None for no change.
    """

    move: Move
    draw: Draw
    change: tuple[int, int] | None = None

    def apply(self, grid: Grid) -> Grid | None:
        moved = self.move(grid)
        return moved if moved is None or self.change is None else np.where(moved == self.change[0], np.int8(self.change[1]), moved)


def _other(rng: Rng, *colours: int) -> int:
    """A colour that is neither 0 nor one of these."""
    return int(rng.choice([colour for colour in range(1, COLOURS) if colour not in colours]))


def _scattered(rng: Rng, rows: int, columns: int, *colours: int) -> Grid:
    """Cells of two random colours on black; cells of the given colours are more likely."""
    palette = [_other(rng, *colours), _other(rng, *colours), *colours, *colours]
    grid = rng.choice(palette, (rows, columns)).astype(np.int8)
    grid[rng.random((rows, columns)) > rng.uniform(0.3, 0.7)] = 0
    return grid


def _mirror(axis: str, grid: Grid) -> Grid:
    return {"columns": grid[:, ::-1], "rows": grid[::-1], "diagonal": grid.T}[axis]


def _fill(colour: int, grid: Grid) -> Grid:
    """Black cells that no path of black cells connects with the border."""
    open_cells = np.pad(grid == 0, 1, constant_values=True)
    reached = np.zeros_like(open_cells)
    reached[[0, -1]] = reached[:, [0, -1]] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= open_cells
        if (grown == reached).all():
            return np.where((grid == 0) & ~reached[1:-1, 1:-1], np.int8(colour), grid)
        reached = grown


def _outline(colour: int, rng: Rng, rows: int, columns: int) -> Grid:
    """The outline of a rectangle, and scattered cells outside of it."""
    edge = _other(rng, colour)
    grid = _scattered(rng, rows, columns) * (rng.random((rows, columns)) < 0.3)
    height, width = rng.integers(3, rows + 1), rng.integers(3, columns + 1)
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    grid[top : top + height, left : left + width] = edge
    grid[top + 1 : top + height - 1, left + 1 : left + width - 1] = 0
    return grid.astype(np.int8)


def _gravity(quarter_turns: int, grid: Grid) -> Grid:
    """Cells fall down, after so many quarter turns."""
    turned = np.rot90(grid, quarter_turns)
    order = np.argsort(turned != 0, axis=0, kind="stable")
    return np.rot90(np.take_along_axis(turned, order, axis=0), -quarter_turns)


def _crop(colour: int, grid: Grid) -> Grid | None:
    """The smallest rectangle with all cells of a colour."""
    rows, columns = np.nonzero(grid == colour)
    return grid[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] if rows.size else None


def _boxed(colour: int, rng: Rng, rows: int, columns: int) -> Grid:
    """Scattered cells, and a rectangle with its corners in a colour."""
    grid = _scattered(rng, rows, columns)
    grid[grid == colour] = 0
    height, width = rng.integers(2, rows), rng.integers(2, columns)
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    grid[np.ix_([top, top + height - 1], [left, left + width - 1])] = colour
    return grid


def _count(colour: int, grid: Grid) -> Grid | None:
    """A row with as many cells as the input has of a colour."""
    count = int((grid == colour).sum())
    return np.full((1, count), colour, dtype=np.int8) if 0 < count <= MAX_SIDE else None


def _few(colour: int, rng: Rng, rows: int, columns: int) -> Grid:
    """Scattered cells, of which one to six have a colour."""
    grid = _scattered(rng, rows, columns)
    grid[grid == colour] = 0
    grid.reshape(-1)[rng.choice(grid.size, rng.integers(1, MOST_COUNTED + 1), replace=False)] = colour
    return grid


def _scatter(*colours: int) -> Draw:
    return lambda rng, rows, columns: _scattered(rng, rows, columns, *colours)


def _copy(grid: Grid) -> Grid:
    return grid


COPY: list[Move] = [_copy]
MIRRORS: list[Move] = [partial(_mirror, axis) for axis in ("columns", "rows", "diagonal")]
FALLS: list[Move] = [partial(_gravity, turns) for turns in range(4)]
OTHERS: dict[str, tuple[Callable[..., Any], Callable[..., Grid]]] = {
    "fill": (_fill, _outline),
    "crop": (_crop, _boxed),
    "count": (_count, _few),
}


def _rules() -> dict[str, list[Rule]]:
    colours, changes = range(1, COLOURS), [*permutations(range(1, COLOURS), 2)]
    simple = {name: [Rule(move, _scatter()) for move in moves] for name, moves in (("copy", COPY), ("mirror", MIRRORS), ("gravity", FALLS))}
    others = {name: [Rule(partial(move, colour), partial(draw, colour)) for colour in colours] for name, (move, draw) in OTHERS.items()}
    changed = {
        name: [Rule(move, _scatter(change[0]), change) for move in moves for change in changes]
        for name, moves in (("recolour", COPY), ("compose", MIRRORS + FALLS))
    }
    return {**simple, **others, **changed}


RULES = _rules()
MOVES = [(move, True) for move in COPY + MIRRORS + FALLS] + [(rule.move, False) for name in OTHERS for rule in RULES[name]]
FAMILIES = ("copy", "mirror", "recolour", "fill", "gravity", "crop", "count", "compose")
"""Names of the families. The rules: the input itself; a mirror of it; one colour becomes another; enclosed black cells get a colour; cells
fall to one side; the smallest rectangle with all cells of a colour; a row with as many cells as the input has of a colour; a mirror or a
fall, then a change of colour."""


def generate(
    count: int,
    seed: int = 0,
    *,
    families: Sequence[str] = FAMILIES,
    smallest: int = 3,
    largest: int = 8,
    demonstrations: int = 3,
    exclude: Iterable[Task] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Task]:
    """Generated tasks, all different, named after family and content, such as mirror-1f0c22ab; families take turns.

    Args:
        count: number of tasks.
        seed: seed of the generator; the same arguments give the same tasks.
        families: names of families from `FAMILIES`.
        smallest: least rows and columns of an input, 3 or more.
        largest: most rows and columns of an input.
        demonstrations: demonstration pairs of a task, 2 or more.
        exclude: tasks that must not come again, such as those of training for a test.
        progress: called after each task with the number of tasks so far; 20,000 small tasks take half a minute.

    Raises:
        InputError: an argument is invalid.
    """
    for family in families:
        if family not in RULES:
            raise InputError(f"families must be among {', '.join(FAMILIES)}, got {shown(family)}{did_you_mean(family, FAMILIES)}")
    if not families:
        raise InputError("families must have at least one name, got none.")
    if not 3 <= smallest <= largest <= MAX_SIDE:
        raise InputError(f"smallest and largest must be 3 to {MAX_SIDE} and in this order, got {smallest} and {largest}.")
    if demonstrations < 2:
        raise InputError(f"demonstrations must be at least 2, got {demonstrations}.")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}.")
    rng = np.random.default_rng(seed)
    seen = {task.digest for task in exclude}
    tasks: list[Task] = []
    while len(tasks) < count:
        family = families[len(tasks) % len(families)]
        task = _task(rng, family, smallest, largest, demonstrations)
        if task.digest not in seen:
            seen.add(task.digest)
            tasks.append(task)
            if progress is not None:
                progress(len(tasks))
    return tasks


def _task(rng: Rng, family: str, smallest: int, largest: int, demonstrations: int) -> Task:
    rule = RULES[family][rng.integers(len(RULES[family]))]
    while True:
        pairs = [_pair(rng, rule, smallest, largest, changes=family != "copy") for _ in range(demonstrations + 1)]
        distinct = {pair.input.tobytes() for pair in pairs}
        if len(distinct) == len(pairs) and _determined(pairs[:-1], pairs[-1]):
            task = Task(family, tuple(pairs[:-1]), tuple(pairs[-1:]))
            return Task(f"{family}-{task.digest[:8]}", task.train, task.test)


def _pair(rng: Rng, rule: Rule, smallest: int, largest: int, *, changes: bool) -> Pair:
    """An input and its output, which differ if `changes`."""
    while True:
        rows, columns = rng.integers(smallest, largest + 1, 2)
        given = rule.draw(rng, int(rows), int(columns))
        output = rule.apply(given)
        if output is not None and np.array_equal(given, output) != changes and given.any():
            return Pair(given, output)


def _determined(demonstrations: Sequence[Pair], test: Pair) -> bool:
    """Whether all rules that explain the demonstrations give the output of the test."""
    for move, with_change in MOVES:
        seen = _colours(move, demonstrations)
        change = None if seen is None else _change(seen, with_change)
        if seen is None or change is None:
            continue
        then = _colours(move, [test])
        if then is None or any(new != change.get(old, old) for old, new in then):
            return False
        known = {0, *(old for old, _ in seen)}
        if with_change and not change and any(old not in known for old, _ in then):
            return False  # a change of that colour explains the demonstrations too
    return True


def _colours(move: Move, pairs: Sequence[Pair]) -> set[tuple[int, int]] | None:
    """Each colour of moved cells with those of the outputs in their places; None where shapes differ."""
    found: set[tuple[int, int]] = set()
    for given, output in pairs:
        moved = move(given)
        if moved is None or output is None or moved.shape != output.shape:
            return None
        found |= {divmod(code, COLOURS) for code in np.unique(moved * np.int8(COLOURS) + output).tolist()}
    return found


def _change(seen: set[tuple[int, int]], with_change: bool) -> dict[int, int] | None:
    """The change of colour, empty for none, with which a move explains pairs; None if it does not explain them."""
    change = {old: new for old, new in seen if old != new}
    one_each = len({old for old, _ in seen}) == len(seen)
    one_change = with_change and one_each and len(change) == 1 and 0 not in (*change, *change.values())
    return change if one_change or not change else None
