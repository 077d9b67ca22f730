"""Changes of a task under which its rule stays a rule: symmetries of the grid, permutations of the colours, orders of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError, shown
from .tasks import COLOURS, Grid, Pair, Task

SYMMETRIES = 8
SAME_COLOURS = tuple(range(COLOURS))


@dataclass(frozen=True)
class Augmentation:
    """A symmetry, a permutation of the colours and an order of the demonstrations, in any combination.

    Args:
        symmetry: 0 to 7: `symmetry % 4` quarter turns, counterclockwise, after rows and columns are exchanged where it is 4 or more.
        colours: colour c becomes `colours[c]`; a permutation of 0–9.
        order: the i-th demonstration becomes the one with the number `order[i]`; None to keep their order.

    Raises:
        InputError: an argument is not as described.
    """

    symmetry: int = 0
    colours: tuple[int, ...] = SAME_COLOURS
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.symmetry not in range(SYMMETRIES):
            raise InputError(f"symmetry must be 0 to {SYMMETRIES - 1}, got {shown(self.symmetry)}.")
        if sorted(self.colours) != list(SAME_COLOURS):
            raise InputError(f"colours must be a permutation of 0 to {COLOURS - 1}, got {shown(self.colours)}.")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            raise InputError(f"order must be a permutation of the demonstrations' numbers from 0, got {shown(self.order)}.")

    @classmethod
    def random(cls, rng: np.random.Generator | int, demonstrations: int, *, keep_black: bool = True) -> Augmentation:
        """A random augmentation; all are equally likely.

        Args:
            rng: random number generator, or a seed.
            demonstrations: number of demonstrations of the task.
            keep_black: whether 0, the background of most tasks, stays 0.
        """
        rng = np.random.default_rng(rng)
        colours = [0, *(1 + rng.permutation(COLOURS - 1))] if keep_black else rng.permutation(COLOURS)
        order = tuple(map(int, rng.permutation(demonstrations)))
        return cls(int(rng.integers(SYMMETRIES)), tuple(map(int, colours)), order)

    def grid(self, grid: Grid) -> Grid:
        """The changed grid, (rows, columns) or (columns, rows) int8."""
        turned = np.rot90(grid.T if self.symmetry >= 4 else grid, self.symmetry % 4)
        return np.array(self.colours, dtype=np.int8)[turned]

    def task(self, task: Task) -> Task:
        """The changed task, under the same name.

        Raises:
            InputError: `order` is of another number of demonstrations; the message names the task.
        """
        order = range(len(task.train)) if self.order is None else self.order
        if len(order) != len(task.train):
            raise InputError(f"order must have {len(task.train)} numbers for task {task.name}, its demonstrations, got {len(order)}.")
        return Task(task.name, tuple(self._pair(task.train[number]) for number in order), tuple(map(self._pair, task.test)))

    def _pair(self, pair: Pair) -> Pair:
        return Pair(self.grid(pair.input), None if pair.output is None else self.grid(pair.output))

    @property
    def inverse(self) -> Augmentation:
        """The augmentation that undoes this one: `augmentation.inverse.grid(answer)` is the answer to the task itself."""
        symmetry = self.symmetry if self.symmetry >= 4 else -self.symmetry % 4
        order = None if self.order is None else _inverse(self.order)
        return Augmentation(symmetry, _inverse(self.colours), order)

    def then(self, other: Augmentation) -> Augmentation:
        """This augmentation followed by another.

        Raises:
            InputError: both have an order, of different numbers of demonstrations.
        """
        turns = self.symmetry % 4
        # Exchanging rows and columns after a turn is the same as doing it before the opposite turn.
        turns = (other.symmetry + (-turns if other.symmetry >= 4 else turns)) % 4
        symmetry = 4 * ((self.symmetry >= 4) != (other.symmetry >= 4)) + turns
        colours = tuple(other.colours[colour] for colour in self.colours)
        if self.order is None or other.order is None:
            return Augmentation(symmetry, colours, other.order if self.order is None else self.order)
        if len(self.order) != len(other.order):
            raise InputError(f"order must have {len(self.order)} numbers as that of the first augmentation, got {len(other.order)}.")
        return Augmentation(symmetry, colours, tuple(self.order[number] for number in other.order))


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, np.argsort(permutation)))


def views(task: Task) -> list[tuple[Augmentation, Task]]:
    """The task in the eight symmetries, each with its augmentation, whose inverse takes an answer back. The first is the task itself."""
    symmetries = [Augmentation(symmetry) for symmetry in range(SYMMETRIES)]
    return [(augmentation, augmentation.task(task)) for augmentation in symmetries]
