"""Scores of an evaluation, from its records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, shown
from .tasks import Task

METHODS = ("greedy", "sampling", "voting", "augscore")
ATTEMPTS = 2


def check_method(method: str, among: Iterable[str] = METHODS) -> None:
    """InputError if a method is not among those named."""
    if method not in (known := list(among)):
        raise InputError(f"method must be one of {', '.join(known)}, got {shown(method)}.")


def is_exact(pair: Mapping[str, Any], method: str, attempts: int) -> bool:
    """Whether one of the first attempts of a method is the true output of a test pair of a record."""
    tried = pair["attempts"][method][:attempts]
    return pair["output"] is not None and any(pair["candidates"][number]["grid"] == pair["output"] for number in tried)


def score(tasks: Sequence[Task], records: Sequence[Mapping[str, Any]], methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Scores of all tasks whose outputs are known; one without a record is unsolved.

    Args:
        tasks: the tasks.
        records: records of some of them.
        methods: methods to score.

    Returns:
        tasks, test_pairs: numbers of all. known_tasks, known_test_pairs: of those with outputs, over which scores are means.
        token_accuracy, grid_accuracy, cell_accuracy, right_shape: of greedy answers, over the known test pairs that fit the context; the
        accuracy of cells is over answers of the right shape. among_candidates: share of known test pairs with the truth among the
        candidates. minutes: sum over the tasks. methods: method -> attempts_1 and attempts_2 -> test_pairs and tasks, how many are
        solved, and score, ARC Prize's mean over tasks of the share of their test pairs. Shares are from 0 to 1, None without any pair.
    """
    of = {record["task"]: record for record in records}
    known = [task for task in tasks if all(pair.output is not None for pair in task.test)]
    known_pairs = [
        of[task.name]["pairs"][number] if task.name in of else None
        for task in tasks
        for number, pair in enumerate(task.test)
        if pair.output is not None
    ]
    answered = [pair for pair in known_pairs if pair is not None and pair["greedy"] is not None]
    same_shape = [pair for pair in answered if np.shape(pair["greedy"]["grid"]) == np.shape(pair["output"])]
    among = [pair is not None and any(one["grid"] == pair["output"] for one in pair["candidates"]) for pair in known_pairs]
    cells = [np.mean(np.array(pair["greedy"]["grid"]) == np.array(pair["output"])) for pair in same_shape]
    return {
        "tasks": len(tasks),
        "test_pairs": sum(len(task.test) for task in tasks),
        "known_tasks": len(known),
        "known_test_pairs": len(known_pairs),
        "token_accuracy": _mean([pair["greedy"]["token_accuracy"] for pair in answered]),
        "grid_accuracy": _mean([pair["greedy"]["grid"] == pair["output"] for pair in answered]),
        "cell_accuracy": _mean(cells),
        "right_shape": len(same_shape) / len(answered) if answered else None,
        "among_candidates": _mean(among),
        "minutes": round(sum(record["seconds"] for record in records) / 60, 3),
        "methods": {
            method: {f"attempts_{count}": _solved(known, known_pairs, of, method, count) for count in range(1, ATTEMPTS + 1)}
            for method in METHODS
            if method in methods
        },
    }


def _solved(
    known: Sequence[Task],
    known_pairs: Sequence[Mapping[str, Any] | None],
    of: Mapping[str, Mapping[str, Any]],
    method: str,
    attempts: int,
) -> dict[str, Any]:
    shares = [
        float(np.mean([is_exact(pair, method, attempts) for pair in of[task.name]["pairs"]])) if task.name in of else 0.0 for task in known
    ]
    return {
        "test_pairs": sum(pair is not None and is_exact(pair, method, attempts) for pair in known_pairs),
        "tasks": sum(share == 1 for share in shares),
        "score": _mean(shares),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
