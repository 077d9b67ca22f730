"""The submission file of ARC Prize: two attempts at every test input."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._io.files import write_atomically
from ..errors import InputError, listed, reason, shown
from .tasks import Grid, Task, as_grid

ATTEMPTS = ("attempt_1", "attempt_2")
NO_ATTEMPT = [[0, 0], [0, 0]]  # as in ARC Prize's sample_submission.json
Attempts = Sequence[Grid | None]


def write_submission(path: str | os.PathLike[str], tasks: Sequence[Task], attempts: Mapping[str, Sequence[Attempts]]) -> None:
    """Writes a submission: `{"00576224": [{"attempt_1": [[...]], "attempt_2": [[...]]}], ...}`.

    The format demands two attempts at every test input of every task. A missing one is written as a black grid of 2 × 2, as in ARC Prize's
    sample submission.

    Args:
        path: the file, submission.json in ARC Prize; it is replaced.
        tasks: all tasks of the challenge.
        attempts: name of a task -> for each of its test pairs up to two grids, (rows, columns), None for one that could not be decoded.
            A task may be missing, as one that is longer than the context.

    Raises:
        InputError: two tasks have one name; `attempts` has a task that is not in the challenge, another number of test pairs, more than
            two attempts or an invalid grid.
    """
    names = {task.name for task in tasks}
    if len(names) < len(tasks):
        raise InputError(f"tasks must have names of their own, got {len(tasks)} with {len(names)} names.")
    unknown = attempts.keys() - names
    if unknown:
        raise InputError(f"attempts must be at tasks of the challenge, got task {min(unknown)}.")
    content = {task.name: _entries(task, attempts.get(task.name, [[]] * len(task.test))) for task in tasks}
    write_atomically(Path(path), json.dumps(content) + "\n")


def _entries(task: Task, attempts: Sequence[Attempts]) -> list[dict[str, list[list[int]]]]:
    _check_count(task, len(attempts))
    entries = []
    for number, grids in enumerate(attempts, start=1):
        where = f"task {task.name}, test pair {number}"
        if len(grids) > len(ATTEMPTS):
            raise InputError(f"{where} must have at most {len(ATTEMPTS)} attempts, got {len(grids)}.")
        padded = [*grids, *[None] * (len(ATTEMPTS) - len(grids))]
        entries.append(
            {
                name: NO_ATTEMPT if grid is None else as_grid(grid, f"{where}: {name}").tolist()
                for name, grid in zip(ATTEMPTS, padded, strict=True)
            }
        )
    return entries


def _check_count(task: Task, count: int) -> None:
    if count != len(task.test):
        raise InputError(f"task {task.name} must have {len(task.test)} entries in a submission, one a test pair, got {count}.")


def check_submission(path: str | os.PathLike[str], tasks: Sequence[Task]) -> dict[str, list[tuple[Grid, Grid]]]:
    """Reads a submission and checks that it has ARC Prize's format, with every task of the challenge and no other.

    Args:
        path: the file.
        tasks: all tasks of the challenge.

    Returns:
        Name of a task -> the two attempts at each of its test inputs, (rows, columns) int8.

    Raises:
        InputError: the file cannot be read or breaks the format; the message names the task.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"submission must be a file that can be read, got {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON in UTF-8, got something else ({reason(error, 80)}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a JSON object of tasks, got {type(content).__name__}.")
    names = {task.name for task in tasks}
    if content.keys() != names:
        wrong = sorted(content.keys() ^ names)[0]
        raise InputError(f"{path} must have the tasks of the challenge, got {'no' if wrong in names else 'an unknown'} task {wrong}.")
    return {task.name: _checked(task, content[task.name]) for task in tasks}


def _checked(task: Task, entries: Any) -> list[tuple[Grid, Grid]]:
    if not isinstance(entries, list):
        raise InputError(f"task {task.name} must have a list of attempts in a submission, got {shown(entries, 40)}.")
    _check_count(task, len(entries))
    found = []
    for number, entry in enumerate(entries, start=1):
        where = f"task {task.name}, test pair {number}"
        if not isinstance(entry, dict) or entry.keys() != set(ATTEMPTS):
            got = f"the fields {listed(entry)}" if isinstance(entry, dict) else shown(entry, 40)
            raise InputError(f"{where} must have {' and '.join(ATTEMPTS)}, got {got}.")
        first, second = (as_grid(entry[name], f"{where}: {name}") for name in ATTEMPTS)
        found.append((first, second))
    return found
