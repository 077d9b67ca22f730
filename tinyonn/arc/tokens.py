"""Tokens of a task: a vocabulary of colours and marks, prompts and answers, and what fits a context.

    <task> (<input> GRID <output> GRID <end>) ... <input> GRID <output> | GRID <end>
    GRID = (<row> colour ... colour) ...

The part before the bar is the prompt, with all demonstrations; the answer follows. With numbered rows the n-th <row> is <row n>.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._io.files import write_atomically
from .._io.units import counted
from ..errors import InputError, listed, reason, shown
from .tasks import COLOURS, MAX_SIDE, Grid, Pair, Task

FILE = "arc_vocabulary.json"
MARKS = ("<task>", "<input>", "<output>", "<end>", "<pad>")
TASK, INPUT, OUTPUT, END, PAD = range(COLOURS, COLOURS + len(MARKS))
FIRST_ROW = PAD + 1  # <row>, or <row 1>


@dataclass(frozen=True)
class Example:
    """A test pair of a task in tokens.

    Attributes:
        task: name of the task.
        number: number of the test pair, from 0.
        prompt: (P,) int64, from <task> to the last <output>.
        answer: (A,) int64, the tokens of the output and <end>; None where the output is unknown.
    """

    task: str
    number: int
    prompt: np.ndarray
    answer: np.ndarray | None


class Decoded(NamedTuple):
    """Attributes: grid: (rows, columns) int8, or None; reason: why there is no grid, such as "no <end>"; empty if there is one."""

    grid: Grid | None
    reason: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of ARC: ids 0–9 are the colours, then come <task>, <input>, <output>, <end>, <pad> and the marks of rows.

    Args:
        numbered_rows: each row begins with its own mark, <row 1> to <row 30>, by which any model has the row of a cell; otherwise all
            begin with <row>. For both coordinates of every token, see `coordinates`.
    """

    numbered_rows: bool = False

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens, in the order of their ids."""
        rows = [f"<row {number}>" for number in range(1, MAX_SIDE + 1)] if self.numbered_rows else ["<row>"]
        return (*map(str, range(COLOURS)), *MARKS, *rows)

    @property
    def pad(self) -> int:
        """Id of <pad>."""
        return PAD

    @property
    def end(self) -> int:
        """Id of <end>, which ends an answer."""
        return END

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, task: Task, number: int = 0) -> Example:
        """A test pair as tokens, with all demonstrations in the prompt.

        Args:
            task: the task.
            number: number of the test pair, from 0.

        Raises:
            InputError: the task has no such test pair.
        """
        pair = _test_pair(task, number)
        parts = [np.array([TASK])]
        for given, output in task.train:
            assert output is not None  # a demonstration has one
            parts += [np.array([INPUT]), self._grid(given), np.array([OUTPUT]), self._grid(output), np.array([END])]
        prompt = np.concatenate([*parts, [INPUT], self._grid(pair.input), [OUTPUT]])
        answer = None if pair.output is None else self.encode_answer(pair.output)
        return Example(task.name, number, prompt, answer)

    def encode_answer(self, grid: Grid) -> np.ndarray:
        """The tokens of an output and <end>, (A,) int64: the inverse of `decode`."""
        return np.concatenate([self._grid(grid), [END]])

    def _grid(self, grid: Grid) -> np.ndarray:
        """(rows * (columns + 1),) int64."""
        rows = FIRST_ROW + np.arange(len(grid)) * self.numbered_rows
        return np.concatenate([rows[:, None], grid.astype(np.int64)], axis=1).reshape(-1)

    def decode(self, answer: Any) -> Decoded:
        """The grid of an answer.

        Args:
            answer: (A,) token ids, a list, array or tensor on the CPU; what follows the first <end> is ignored.
        """
        ids = np.asarray(answer, dtype=np.int64).reshape(-1)
        ends = np.flatnonzero(ids == END)
        if not ends.size:
            return Decoded(None, "no <end>")
        return self._decode_grid(ids[: ends[0]])

    def _decode_grid(self, ids: np.ndarray) -> Decoded:
        is_row, is_colour = self._is_row(ids), (ids >= 0) & (ids < COLOURS)
        strange = np.flatnonzero(~(is_row | is_colour))
        if not ids.size:
            return Decoded(None, "empty")
        if strange.size:
            token = ids[strange[0]]
            return Decoded(None, f"{self.tokens[token] if 0 <= token < len(self) else f'the id {token}'} inside the grid")
        if not is_row[0]:
            return Decoded(None, "no mark before the first row")
        begins = np.flatnonzero(is_row)
        widths = np.diff([*begins, len(ids)]) - 1
        if (widths != widths[0]).any():
            odd = int(np.flatnonzero(widths != widths[0])[0])
            return Decoded(None, f"rows of different lengths: {widths[0]} in row 1, {widths[odd]} in row {odd + 1}")
        if len(begins) > MAX_SIDE or not 1 <= widths[0] <= MAX_SIDE:
            return Decoded(None, f"{len(begins)} × {widths[0]} cells, outside 1 to {MAX_SIDE}")
        if self.numbered_rows and (ids[begins] != FIRST_ROW + np.arange(len(begins))).any():
            return Decoded(None, "row numbers out of order")
        return Decoded(ids[is_colour].reshape(len(begins), -1).astype(np.int8))

    def _is_row(self, ids: np.ndarray) -> np.ndarray:
        return (ids >= FIRST_ROW) & (ids < len(self))

    def decode_pairs(self, ids: Any) -> list[Pair]:
        """The pairs of a prompt, or of a prompt and an answer: the inverse of `encode`. The last has no output without an answer.

        Args:
            ids: (T,) token ids, without padding.

        Raises:
            InputError: the tokens are in another order than `encode` puts them.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        marks = [*np.flatnonzero((ids >= TASK) & (ids <= PAD)), len(ids)]
        grids = [self._decode_grid(ids[mark + 1 : following]).grid for mark, following in pairwise(marks) if ids[mark] in (INPUT, OUTPUT)]
        pairs = [Pair(given, output) for given, output in zip(grids[::2], grids[1::2], strict=False) if given is not None]
        if len(pairs) > 1 and all(pair.output is not None for pair in pairs[:-1]):
            example = self.encode(Task("", tuple(pairs[:-1]), tuple(pairs[-1:])))
            if np.array_equal(ids, example.prompt if example.answer is None else np.concatenate([example.prompt, example.answer])):
                return pairs
        raise InputError(f"tokens must be those of one task as encode gives them, got {len(ids):,} in another order.")

    def length(self, task: Task, number: int = 0, *, turned: bool = False) -> int:
        """Tokens of prompt and answer. Where the output is unknown, the largest grid of the task takes its place.

        Args:
            task: the task.
            number: number of the test pair, from 0.
            turned: of the task with rows and columns exchanged, which has as many cells but not as many rows.
        """
        pair = _test_pair(task, number)
        known = [grid for demonstration in task.train for grid in demonstration if grid is not None] + [pair.input]
        sizes = [grid.size + grid.shape[turned] for grid in known]
        answer = max(sizes) if pair.output is None else pair.output.size + pair.output.shape[turned]
        return 1 + 3 * len(task.train) + sum(sizes) + 2 + answer + 1

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vocabulary into the folder of a checkpoint, as arc_vocabulary.json."""
        write_atomically(Path(folder) / FILE, json.dumps({"tokens": self.tokens}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Vocabulary:
        """The vocabulary of a checkpoint.

        Raises:
            InputError: the folder has no arc_vocabulary.json, that of another version, or a config.json with a smaller vocab_size.
        """
        tokens = _field(Path(folder) / FILE, "tokens")
        found = next((one for one in (cls(False), cls(True)) if list(one.tokens) == tokens), None)
        if found is None:
            raise InputError(f"{Path(folder) / FILE} must have the tokens of ARC, got {shown(tokens, 40)}: train the model anew.")
        config = Path(folder) / "config.json"
        size = _field(config, "vocab_size") if config.exists() else len(found)
        if not isinstance(size, int) or size < len(found):
            raise InputError(f"vocab_size of {config} must be at least {len(found)}, the tokens of ARC, got {shown(size)}.")
        return found

    def check(self, folder: str | os.PathLike[str]) -> None:
        """Checks that a checkpoint was trained with this vocabulary.

        Raises:
            InputError: it has another, or none.
        """
        found = type(self).load(folder)
        if found != self:
            raise InputError(
                f"vocabulary of {folder} must have numbered_rows={self.numbered_rows}, as the tasks are encoded, "
                f"got numbered_rows={found.numbered_rows}."
            )


def _test_pair(task: Task, number: int) -> Pair:
    if not 0 <= number < len(task.test):
        raise InputError(f"number must be that of a test pair of task {task.name}, 0 to {len(task.test) - 1}, got {number}.")
    return task.test[number]


def _field(path: Path, name: str) -> Any:
    """A field of a JSON file; None if it is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        inside = path.parent / "model"
        hint = f"; did you mean {inside}?" if (inside / path.name).is_file() else "."
        raise InputError(f"checkpoint must be one trained on ARC, with {path.name}, got {path.parent}: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON in UTF-8, got something else ({reason(error, 80)}).") from None
    return content.get(name) if isinstance(content, dict) else None


class Fitting(NamedTuple):
    """What of some tasks fits a context.

    Attributes:
        pairs: tasks and numbers of their test pairs that fit, in the order of the tasks.
        longer: name of each task with a test pair that does not fit -> tokens of the longest of these.
        tasks: number of all tasks.
        context: tokens of the context.
    """

    pairs: list[tuple[Task, int]]
    longer: dict[str, int]
    tasks: int
    context: int

    def __str__(self) -> str:
        """For a log: "2 of 400 tasks are longer than the context of 4,096 tokens: 1a2b3c4d (5,000), ..."."""
        if not self.longer:
            return f"All of {counted(self.tasks, 'task')} fit the context of {self.context:,} tokens."
        names = listed(f"{name} ({tokens:,})" for name, tokens in sorted(self.longer.items(), key=lambda item: item[1]))
        verb = "is" if len(self.longer) == 1 else "are"
        return f"{len(self.longer):,} of {counted(self.tasks, 'task')} {verb} longer than the context of {self.context:,} tokens: {names}."


def fit_context(tasks: Iterable[Task], vocabulary: Vocabulary, context: int, *, turned: bool = False) -> Fitting:
    """Test pairs that fit a context with all demonstrations and the answer, and the tasks that are longer.

    Args:
        tasks: the tasks.
        vocabulary: the tokens.
        context: tokens of the context.
        turned: whether the tasks must also fit with rows and columns exchanged, as symmetries do.

    Raises:
        InputError: no task fits; the message names the shortest.
    """
    pairs: list[tuple[Task, int]] = []
    longer: dict[str, int] = {}
    count = 0
    shortest: tuple[int, str] | None = None
    for task in tasks:
        count += 1
        for number in range(len(task.test)):
            tokens = max(vocabulary.length(task, number, turned=way) for way in ((False, True) if turned else (False,)))
            shortest = min(shortest or (tokens, task.name), (tokens, task.name))
            if tokens <= context:
                pairs.append((task, number))
            else:
                longer[task.name] = max(tokens, longer.get(task.name, 0))
    if shortest is None:
        raise InputError("tasks must have at least one task, got none.")
    if not pairs:
        raise InputError(f"context must be at least {shortest[0]:,}, the tokens of the shortest task, {shortest[1]}, got {context:,}.")
    return Fitting(pairs, longer, count, context)
