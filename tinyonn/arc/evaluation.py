"""Evaluation on ARC: answers in free generation, votes over augmentations, AugScore, and two attempts by each method."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .._io.units import counted
from ..errors import InputError
from ..hf.loading import position_limit, settings_of
from ..train.eavi import excursion
from .augmentations import SYMMETRIES, Augmentation
from .evaluation_records import Records
from .evaluation_scores import ATTEMPTS, METHODS, check_method, is_exact, score
from .scoring import aug_scores
from .tasks import MAX_SIDE, Grid, Task
from .tokens import Example, Vocabulary, fit_context

LONGEST_ANSWER = MAX_SIDE * (MAX_SIDE + 1) + 1
Progress = Callable[[float, str], None]
_SHARES = (0.5, 0.85, 1.0)  # of a pair's time, after its views, samples and scores


class Decoding(NamedTuple):
    """How answers are made. Attributes: see `evaluate`."""

    views: int
    samples: int
    temperature: float
    batch_size: int
    context: int
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        tasks: the tasks.
        records: a mapping for each task that fits the context, with `pairs`: the answers to each test pair, as in predictions.jsonl.
        scores: the numbers of scores.json.
    """

    tasks: list[Task]
    records: list[dict[str, Any]]
    scores: dict[str, Any]

    def attempts(self, method: str = "augscore") -> dict[str, list[list[Grid]]]:
        """Name of a task -> up to two grids for each of its test pairs, as `write_submission` takes them.

        Args:
            method: "greedy", "sampling", "voting" or "augscore".

        Raises:
            InputError: there is no such method, or it was not among those of the evaluation.
        """
        check_method(method, self.scores["methods"])
        return {record["task"]: [_attempted(pair, method) for pair in record["pairs"]] for record in self.records}


def _attempted(pair: Mapping[str, Any], method: str) -> list[Grid]:
    return [np.array(pair["candidates"][number]["grid"], dtype=np.int8) for number in pair["attempts"][method]]


def evaluate(
    model: nn.Module,
    vocabulary: Vocabulary,
    tasks: Iterable[Task],
    *,
    context: int,
    methods: Sequence[str] = METHODS,
    views: int = 16,
    samples: int = 8,
    temperature: float = 1.0,
    batch_size: int = 16,
    max_new_tokens: int = LONGEST_ANSWER,
    seed: int = 0,
    predictions: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answers of a model to the test pairs of tasks, in free generation, and their scores.

    For each test pair, the model writes its most likely answer to the task and to augmented views of it, whose answers are reverted, and
    draws samples. All answers that are grids are candidates. The methods choose two attempts among them: "greedy" is the most likely
    answer alone, "sampling" takes the most frequent samples, "voting" the candidates that most views gave, "augscore" those with the
    highest sum of log-probabilities over the eight symmetries.

    Answers depend on the options and the task alone, so an evaluation that was stopped goes on with the next task.

    Args:
        model: a causal language model of transformers.
        vocabulary: the tokens it was trained with.
        tasks: the tasks, whose names differ. An output that is unknown gets attempts and no score.
        context: most tokens of prompt and answer; tasks that are longer in any view count as unsolved.
        methods: what is compared; ("greedy",) takes one answer to each test pair, and the least time.
        views: views that vote: the task itself, its other seven symmetries, then random augmentations with colours and order.
        samples: answers drawn from the model's distribution.
        temperature: temperature of the samples.
        batch_size: answers that are generated or scored at once.
        max_new_tokens: tokens of an answer, at most.
        seed: seed of samples and augmentations.
        predictions: a file of JSON lines, which gets each task's record when it is done; tasks that it has are not evaluated again.
        progress: is called with the fraction done and a few words.

    Raises:
        InputError: no task fits the context, or it is longer than the model's positions; two tasks have one name; `predictions` is of
            another model or other options, or damaged; an option is out of range; the model's logits are not finite.
    """
    tasks = list(tasks)
    _check_names(tasks)
    for method in methods or [""]:
        check_method(method)
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be above 0 and finite, got {temperature}.")
    for name, value in (("views", views), ("samples", samples), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    votes, drawn = not {"voting", "augscore"}.isdisjoint(methods), not {"sampling", "augscore"}.isdisjoint(methods)
    decoding = Decoding(views if votes else 1, samples if drawn else 0, temperature, batch_size, context, max_new_tokens, seed)
    check_context(context, position_limit(model.config) if hasattr(model, "config") else None)
    fitting = fit_context(tasks, vocabulary, context, turned=True)
    fits: dict[str, list[int]] = {}
    for task, number in fitting.pairs:
        fits.setdefault(task.name, []).append(number)
    identity: dict[str, Any] = {
        "model": fingerprint(model),
        "numbered_rows": vocabulary.numbered_rows,
        "methods": [method for method in METHODS if method in methods],
        **decoding._asdict(),
    }
    records = Records(predictions, identity)
    bar = _Bar(progress, tasks, fits, vocabulary, identity["methods"][-1])
    waiting = {task.name for task in tasks if task.name in fits and records.get(task) is None}
    for task in tasks:
        if task.name not in waiting:
            bar.add(task, records.get(task))
    try:
        for task in (task for task in tasks if task.name in waiting):
            records.add(task, _record(model, vocabulary, task, fits[task.name], decoding, methods, bar))
            bar.add(task, records.get(task))
            bar.show()
    finally:
        records.close()
    found = [record for task in tasks if (record := records.get(task)) is not None]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    scores = {**score(tasks, found, methods), "longer_than_context": fitting.longer, "parameters": parameters, "options": identity}
    return Evaluation(tasks, found, scores)


def check_context(context: int, positions: int | None) -> None:
    """InputError if a context is longer than the positions of a model, if it has a limit."""
    if positions is not None and context > positions:
        raise InputError(f"context must be at most {positions:,}, the positions of the model, got {context:,}.")


def _check_names(tasks: Sequence[Task]) -> None:
    names: set[str] = set()
    for task in tasks:
        if task.name in names:
            raise InputError(f"tasks must have names of their own, got two tasks {task.name}.")
        names.add(task.name)


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model: of its configuration, of the names and shapes of its parameters and buffers, and of up to 4,096 values
    of each."""
    digest = hashlib.sha256()
    if hasattr(model, "config"):
        digest.update(json.dumps(settings_of(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        step = max(1, tensor.numel() // 4096)
        digest.update(tensor.detach().flatten()[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Bar:
    """Progress in units of the tokens of test pairs, which their time follows roughly, and what `method` has solved so far."""

    def __init__(
        self,
        progress: Progress | None,
        tasks: Sequence[Task],
        fits: Mapping[str, Sequence[int]],
        vocabulary: Vocabulary,
        method: str,
    ) -> None:
        self._progress, self._method = progress, method
        self._weights = {task.name: {number: vocabulary.length(task, number) for number in fits.get(task.name, ())} for task in tasks}
        self._total = sum(map(sum, (weights.values() for weights in self._weights.values())))
        self._done, self._tasks, self._count, self._solved, self._known = 0.0, 0, len(tasks), 0, 0

    def part(self, task: Task, number: int, before: Iterable[int], share: float) -> None:
        """Shows that a share of a test pair is done, after the pairs `before` it."""
        weights = self._weights[task.name]
        self.show(sum(weights[earlier] for earlier in before) + share * weights[number])

    def add(self, task: Task, record: Mapping[str, Any] | None) -> None:
        """Counts a task that is done."""
        self._done += sum(self._weights[task.name].values())
        self._tasks += 1
        if all(pair.output is not None for pair in task.test):
            self._known += 1
            self._solved += record is not None and all(is_exact(pair, self._method, ATTEMPTS) for pair in record["pairs"])

    def show(self, more: float = 0.0) -> None:
        """Shows what is done, and `more` of a task."""
        if self._progress is not None:
            solved = f", {self._solved:,} of {self._known:,} solved" if self._known else ""
            self._progress((self._done + more) / self._total, f"{self._tasks:,} of {counted(self._count, 'task')}{solved}")


def _record(
    model: nn.Module,
    vocabulary: Vocabulary,
    task: Task,
    numbers: Sequence[int],
    decoding: Decoding,
    methods: Sequence[str],
    bar: _Bar,
) -> dict[str, Any]:
    """What predictions.jsonl has of a task."""
    begun = time.perf_counter()
    pairs = []
    for number, pair in enumerate(task.test):
        answered: dict[str, Any] = {"greedy": None, "candidates": [], "attempts": {method: [] for method in METHODS if method in methods}}
        if number in numbers:
            before = [earlier for earlier in numbers if earlier < number]
            report = partial(bar.part, task, number, before)
            answered = _answers(model, vocabulary, task, number, decoding, methods, report)
        grids = {"input": pair.input.tolist(), "output": None if pair.output is None else pair.output.tolist()}
        pairs.append({**grids, "fits": number in numbers, **answered})
    train = [[grid.tolist() for grid in pair if grid is not None] for pair in task.train]
    return {"task": task.name, "digest": task.digest, "seconds": round(time.perf_counter() - begun, 3), "train": train, "pairs": pairs}


@dataclass
class _Candidate:
    """A grid that the model answered. Attributes: votes: views with this answer; samples: samples with it; log_prob: its AugScore."""

    grid: list[list[int]]
    votes: int = 0
    samples: int = 0
    log_prob: float | None = None


def _answers(
    model: nn.Module,
    vocabulary: Vocabulary,
    task: Task,
    number: int,
    decoding: Decoding,
    methods: Sequence[str],
    report: Callable[[float], None],
) -> dict[str, Any]:
    """Answers to a test pair: the greedy one, all candidates, and the candidates that each method attempts."""
    seed = int.from_bytes(hashlib.sha256(f"{decoding.seed} {task.digest} {number}".encode()).digest()[:7])
    augmentations = _augmentations(task, decoding.views, seed)
    examples = [vocabulary.encode(augmentation.task(task), number) for augmentation in augmentations]
    written = _generated(model, vocabulary, examples, decoding)
    report(_SHARES[0])
    drawn = _generated(model, vocabulary, [examples[0]] * decoding.samples, decoding, decoding.temperature, seed)
    report(_SHARES[1])

    candidates: dict[bytes, _Candidate] = {}

    def candidate(grid: Grid) -> _Candidate:
        return candidates.setdefault(bytes(grid.shape) + grid.tobytes(), _Candidate(grid.tolist()))

    for augmentation, answer in zip(augmentations, written, strict=True):
        if (grid := vocabulary.decode(answer).grid) is not None:
            candidate(augmentation.inverse.grid(grid)).votes += 1
    for answer in drawn:
        if (grid := vocabulary.decode(answer).grid) is not None:
            candidate(grid).samples += 1
    found = list(candidates.values())
    if "augscore" in methods:
        _add_scores(model, vocabulary, task, number, found, decoding)
    report(_SHARES[2])

    greedy = vocabulary.decode(written[0])
    truth = examples[0].answer
    described = {
        "grid": None if greedy.grid is None else greedy.grid.tolist(),
        "reason": greedy.reason,
        "token_accuracy": None if truth is None else token_accuracy(np.array(written[0]), truth),
    }
    attempts = {
        "greedy": [place for place, one in enumerate(found) if one.grid == described["grid"]],
        "sampling": _best(found, lambda one: one.samples),
        "voting": _best(found, lambda one: one.votes),
        "augscore": _best(found, lambda one: -np.inf if one.log_prob is None else one.log_prob, -np.inf),
    }
    chosen = {method: attempts[method] for method in METHODS if method in methods}
    return {"greedy": described, "candidates": [asdict(one) for one in found], "attempts": chosen}


def _augmentations(task: Task, count: int, seed: int) -> list[Augmentation]:
    """The task itself, its other symmetries, then random augmentations with each symmetry in turn."""
    found = [Augmentation(symmetry) for symmetry in range(min(count, SYMMETRIES))]
    rng = np.random.default_rng(seed)
    for number in range(SYMMETRIES, count):
        drawn = Augmentation.random(rng, len(task.train))
        found.append(Augmentation(number % SYMMETRIES, drawn.colours, drawn.order))
    return found


def _generated(
    model: nn.Module, vocabulary: Vocabulary, examples: Sequence[Example], decoding: Decoding, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Tokens of the answers. Prompts of one length share a batch, so that none is padded and each can use the whole context."""
    by_length: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        by_length.setdefault(len(example.prompt), []).append(place)
    found: dict[int, list[int]] = {}
    for length, places in by_length.items():
        for begin in range(0, len(places), decoding.batch_size):
            chunk = places[begin : begin + decoding.batch_size]
            answers = excursion(
                model, [torch.from_numpy(examples[place].prompt) for place in chunk], end_token_id=vocabulary.end,
                pad_token_id=vocabulary.pad, max_new_tokens=min(decoding.max_new_tokens, decoding.context - length),
                temperature=temperature, seed=seed + begin,
            )  # fmt: skip
            found.update(zip(chunk, (answer.tolist() for answer in answers), strict=True))
    return [found[place] for place in range(len(examples))]


def _add_scores(
    model: nn.Module, vocabulary: Vocabulary, task: Task, number: int, candidates: Sequence[_Candidate], decoding: Decoding
) -> None:
    """AugScore of the candidates that fit the context in every view; others have none, and come last."""
    prompts = [len(vocabulary.encode(Augmentation(way).task(task), number).prompt) for way in (0, 1)]
    grids = [np.array(one.grid, dtype=np.int8) for one in candidates]
    fitting = [
        place
        for place, grid in enumerate(grids)
        if max(prompts[way] + grid.size + grid.shape[way] + 1 for way in (0, 1)) <= decoding.context
    ]
    scores = aug_scores(model, vocabulary, task, number, [grids[place] for place in fitting], batch_size=decoding.batch_size)
    for place, value in zip(fitting, scores, strict=True):
        candidates[place].log_prob = value if np.isfinite(value) else None


def _best(candidates: Sequence[_Candidate], value: Callable[[_Candidate], float], least: float = 1) -> list[int]:
    """The two candidates of the highest value, `least` or more; of equal ones those that came first."""
    order = sorted(range(len(candidates)), key=lambda number: -value(candidates[number]))
    return [number for number in order if value(candidates[number]) >= least][:ATTEMPTS]


def token_accuracy(answer: np.ndarray, truth: np.ndarray) -> float:
    """Share of positions with the true token, over the longer of the two.

    Args:
        answer: (A,) token ids of an answer.
        truth: (A',) those of the true answer.
    """
    shared = min(len(answer), len(truth))
    return float((answer[:shared] == truth[:shared]).sum() / max(len(answer), len(truth)))
