"""Interleaved timing of several ways to compute one thing. For benchmarks: `benchmarks/conftest.py` and `benchmarks/gpu.py`.

Candidates are checked against each other, then timed in turn, round after round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import gc
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity

from ..errors import reason
from ..ops.experts import _huge_pages

SAMPLE_SECONDS = 0.01  # a sample repeats a fast call until it lasts this long
BUDGET_SECONDS = 10.0  # of one question, all candidates together
MIN_ROUNDS, MAX_ROUNDS = 5, 60
LEFT_OUT = "left out"

Candidates = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each candidate, one number a round; the first candidate is ours. `info` may be added to later."""

    group: str
    samples: dict[str, list[float]]
    info: dict[str, Any]

    @property
    def subject(self) -> str:
        return next(iter(self.samples))

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, peer: str) -> float:
        """How many times longer `peer` takes than our candidate."""
        return self.median(peer) / self.median(self.subject)

    def ratios(self) -> dict[str, float]:
        return {name: self.ratio(name) for name in self.samples if name != self.subject}

    def as_json(self) -> dict[str, Any]:
        """Milliseconds, ratios and all of `info`."""
        return {
            "group": self.group,
            "subject": self.subject,
            "median_ms": {name: self.median(name) * 1e3 for name in self.samples},
            "times_the_subject": self.ratios(),
            "rounds": len(self.samples[self.subject]),
            "samples_ms": {name: [round(second * 1e3, 6) for second in seconds] for name, seconds in self.samples.items()},
            "info": self.info,
        }

    def lines(self) -> list[str]:
        """The group and its notes, then a line for each candidate."""
        notes = ", ".join(f"{key} {value}" for key, value in self.info.items())
        rows = [self.group + (f" ({notes})" if notes else "")]
        for name in self.samples:
            peer = "" if name == self.subject else f"{self.ratio(name):10.2f}x"
            rows.append(f"  {name:<40} {self.median(name) * 1e3:12.4f} ms {peer}".rstrip())
        return rows


def measure(
    group: str,
    candidates: Candidates,
    check: Callable[[dict[str, Any]], Mapping[str, float] | None] | None = None,
    *,
    before: Callable[[], object] | None = None,
    rounds: int | None = None,
    info: Mapping[str, Any] | None = None,
    optional: Collection[str] = (),
    timed: bool = True,
    budget: float = BUDGET_SECONDS,
) -> Comparison:
    """Runs every candidate once, checks the results, then times all in turn.

    Args:
        group: title of the question.
        candidates: name -> a call without arguments; ours first.
        check: receives {name: result of one call} before anything is timed and raises where they disagree. What it returns, errors
            by name, stands in `info["error"]`.
        before: runs, untimed, ahead of every sample; each sample is then a single call.
        rounds: of all candidates; by default as many as fit `budget` seconds, from 5 to 60.
        info: facts that belong to the figures: realised counts, bytes, the goal.
        optional: peers that may fail here: the reason then stands in `info["left out"]`, and the others are measured.
        timed: whether to time at all; if not, the samples are the first calls.
        budget: seconds of all samples together.

    Raises:
        AssertionError: of `check`. What a candidate raises that is not optional.
    """
    notes = dict(info or {})
    first_seconds: dict[str, float] = {}
    outputs: dict[str, Any] = {}
    for name, call in candidates.items():
        try:
            if before is not None:
                before()
            start = now()
            outputs[name] = call()
            first_seconds[name] = getattr(outputs[name], "seconds", now() - start)
        except Exception as error:
            if name not in optional or isinstance(error, AssertionError):
                raise
            now()  # a GPU that the peer has broken fails here, and with it the question
            notes.setdefault(LEFT_OUT, {})[name] = last_line(error)
    if check is not None:
        errors = check(outputs)
        if errors:
            notes["error"] = dict(errors)
    del outputs
    running = {name: candidates[name] for name in first_seconds}
    samples = interleave(running, before, rounds, budget) if timed else {name: [seconds] for name, seconds in first_seconds.items()}
    return Comparison(group, samples, notes)


def last_line(error: BaseException) -> str:
    """As the last line of a traceback: the type and the message, on one line."""
    text = reason(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    candidates: Candidates, before: Callable[[], object] | None, rounds: int | None, budget: float = BUDGET_SECONDS
) -> dict[str, list[float]]:
    """Seconds per call, by candidate and round."""
    loops, seconds = {}, {}
    for name, call in candidates.items():
        if before is not None:
            before()
        once = _sample(call, 1)
        loops[name] = 1 if before is not None else max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9)))
        seconds[name] = once if loops[name] == 1 else _sample(call, loops[name])
    round_seconds = sum(seconds[name] * loops[name] for name in candidates)
    rounds = rounds or min(max(int(budget / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        random.Random(turn).shuffle(names)  # no candidate always follows the same neighbour: its cache, and the memory that it gave back
        for name in names:
            if before is not None:
                before()
            samples[name].append(_sample(candidates[name], loops[name]))
    return samples


def _sample(call: Callable[[], Any], loops: int) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        own, start = 0.0, now()
        for _ in range(loops):
            own += getattr(call(), "seconds", 0.0)
        return (own or now() - start) / loops
    finally:
        if collecting:
            gc.enable()


def peak_megabytes(call: Callable[[], Any], device: str) -> float:
    """The most memory that one call allocates beyond what there was.

    On a CPU it is read from events of torch's allocator, so it is the same every time; meanwhile gradients come from there too, not
    from pages of their own.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with (
        mock.patch.object(_huge_pages, "WORTH_BYTES", sys.maxsize),
        torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    taken = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return most / 1e6


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
