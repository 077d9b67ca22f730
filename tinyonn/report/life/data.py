"""What the log of a life holds, as arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..scan.grid import Floats

MOST_POINTS = 160  # of a line
MOST_PERIODS = 40  # rows of a map


@dataclass(frozen=True)
class Expert:
    """One slot of a layer: when its expert began, how many it has had, and what the present one did."""

    layer: str
    number: int
    live: bool
    birth_step: int
    lives: int
    activations: int
    surprise: float


class LifeLogFiles:
    """FOLDER/log of a life, as far as it is written.

    Attributes:
        metrics: lines of training, with a loss.
        evaluations: lines of held-out text.
        events: births and recyclings.
        choices: layer -> (step, counts of the experts) of each line.
        experts: all slots.
        step: step of the last snapshot of the experts.
        sample: generated text and why training stopped; None while it runs.
    """

    def __init__(self, folder: Path) -> None:
        log = folder / "log"
        lines = read_lines(log / "metrics.jsonl")
        self.metrics = [line for line in lines if "loss" in line]
        self.evaluations = [line for line in lines if "eval_loss" in line]
        self.events = read_lines(log / "events.jsonl")
        self.choices: dict[str, list[tuple[int, list[int]]]] = {}
        for line in read_lines(log / "choices.jsonl"):
            self.choices.setdefault(line["layer"], []).append((line["step"], line["counts"]))
        snapshot: dict[str, Any] = _read(log / "experts.json") or {"step": 0, "layers": {}}
        self.step: int = snapshot["step"]
        self.experts = [
            Expert(layer, number, *values)
            for layer, found in snapshot["layers"].items()
            for number, values in enumerate(
                zip(found["live"], found["birth_step"], found["lives"], found["activations"], found["surprise"], strict=True)
            )
        ]
        self.sample: dict[str, Any] | None = _read(log / "sample.json")

    def series(self, name: str) -> Floats:
        """Values of a metric in each line of training; NaN where it is missing."""
        return np.array([line.get(name, np.nan) for line in self.metrics], dtype=np.float64)

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.metrics]

    def population(self, kind: str) -> Floats:
        """Number of events of a kind up to each line of training."""
        steps = sorted(event["step"] for event in self.events if event["kind"] == kind)
        return np.searchsorted(steps, self.steps, side="right").astype(np.float64)

    def shares(self, layer: str) -> tuple[list[str], Floats]:
        """Names of periods, and (periods, E): how often each expert was chosen, in units of the layer's mean."""
        lines = self.choices[layer]
        size = -(-len(lines) // MOST_PERIODS)
        groups = [lines[begin : begin + size] for begin in range(0, len(lines), size)]
        counts = np.array([np.sum([counts for _, counts in group], axis=0) for group in groups], dtype=np.float64)
        total = counts.sum(1, keepdims=True)
        return [f"{group[-1][0]:,}" for group in groups], np.divide(
            counts * counts.shape[1], total, where=total > 0, out=np.zeros_like(counts)
        )


def thinned(steps: Sequence[int], values: Sequence[Floats]) -> tuple[list[str], list[Floats]]:
    """At most `MOST_POINTS` means of neighbouring values, with the last step of each; NaN counts for nothing."""
    size = max(1, -(-len(steps) // MOST_POINTS))
    edges = range(0, len(steps), size)
    rows = [f"{steps[min(begin + size, len(steps)) - 1]:,}" for begin in edges]
    return rows, [means(one) for one in values]


def means(values: Floats) -> Floats:
    """Means of neighbouring values, at most `MOST_POINTS`; NaN counts for nothing."""
    size = max(1, -(-len(values) // MOST_POINTS))
    return np.array([_mean(values[begin : begin + size]) for begin in range(0, len(values), size)], dtype=np.float64)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; one that was cut off is left out, and there are none without the file."""
    found = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
    return found


def _read(file: Path) -> Any:
    """A JSON object; None without the file, or if it was cut off."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
