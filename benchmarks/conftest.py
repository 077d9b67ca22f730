"""What every benchmark shares: interleaved timing, one table row per candidate, ratios of medians.

A benchmark names one question. Its candidates are checked against each other, then timed in turn, round after round,
so that a machine that slows down slows all of them:

    def test_token_grad_norms_against_einsum(compare):
        result = compare(
            "token grad norms, 512 x 512 x 512",                   # the group: one table
            {"tinyonn": lambda: token_grad_norms(x, g), "einsum": lambda: einsum_norms(x, g)},   # ours first
            check=lambda out: torch.testing.assert_close(out["tinyonn"], out["einsum"]),
            info={"goal": "einsum >= 1000x"},                      # realised counts, bytes, the goal
        )
        result.ratio("einsum")                                     # median of einsum / median of tinyonn

The ratios stand in `extra_info` of the JSON (`--benchmark-json`) and are printed after pytest-benchmark's tables.
"""

from __future__ import annotations

import copy
import gc
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from tinyonn.ops import _huge_pages

SAMPLE_SECONDS = 0.01  # a sample repeats a fast call until it lasts this long
BUDGET_SECONDS = 10.0  # of one question, all candidates together
MIN_ROUNDS, MAX_ROUNDS = 5, 60

_comparisons: list[Comparison] = []


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each candidate, one number a round; the first candidate is ours."""

    group: str
    samples: dict[str, list[float]]
    info: dict[str, Any]

    @property
    def subject(self) -> str:
        return next(iter(self.samples))

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, peer: str, subject: str | None = None) -> float:
        """How many times longer `peer` takes than `subject` (by default our candidate)."""
        return self.median(peer) / self.median(subject or self.subject)

    def ratios(self) -> dict[str, float]:
        return {name: self.ratio(name) for name in self.samples if name != self.subject}


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., Comparison]:
    """`compare(group, candidates, check=None, *, before=None, rounds=None, info=None) -> Comparison`.

    `check` receives {name: output of one call} before anything is timed and raises where they disagree. `before` runs,
    untimed, ahead of every sample and then each sample is a single call (for candidates that consume what `before` makes).
    A candidate that returns an object with `seconds` has timed itself: opening and removing files does not count then.
    Under `--benchmark-disable` every candidate runs once and is checked; the medians are then of that one call.
    """

    def run(
        group: str,
        candidates: Mapping[str, Callable[[], Any]],
        check: Callable[[dict[str, Any]], None] | None = None,
        *,
        before: Callable[[], object] | None = None,
        rounds: int | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Comparison:
        first_seconds, outputs = {}, {}
        for name, call in candidates.items():
            if before is not None:
                before()
            start = _now()
            outputs[name] = call()
            first_seconds[name] = getattr(outputs[name], "seconds", _now() - start)
        if check is not None:
            check(outputs)
        del outputs
        if benchmark.disabled:
            samples = {name: [seconds] for name, seconds in first_seconds.items()}
        else:
            samples = _interleave(candidates, before, rounds)
        result = Comparison(group, samples, dict(info or {}))
        _record(benchmark, result)
        return result

    return run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a question's tensors lie; `make gpu` runs those on the GPU alone."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.fixture
def peak_megabytes(device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], float]:
    """`peak_megabytes(call)`: the most memory that one call allocates beyond what there was; of events, so the same every time.

    Events are of torch's allocator: while it is measured, gradients come from there too, not from pages of their own.
    """

    def measure(call: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        with monkeypatch.context() as patch, torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            patch.setattr(_huge_pages, "WORTH_BYTES", sys.maxsize)
            call()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most / 1e6

    return measure


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _interleave(
    candidates: Mapping[str, Callable[[], Any]], before: Callable[[], object] | None, rounds: int | None
) -> dict[str, list[float]]:
    loops, seconds = {}, {}
    for name, call in candidates.items():
        if before is not None:
            before()
        once = _sample(call, 1)
        loops[name] = 1 if before is not None else max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9)))
        seconds[name] = once if loops[name] == 1 else _sample(call, loops[name])
    round_seconds = sum(seconds[name] * loops[name] for name in candidates)
    rounds = rounds or min(max(int(BUDGET_SECONDS / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
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
        own, start = 0.0, _now()
        for _ in range(loops):
            own += getattr(call(), "seconds", 0.0)
        return (own or _now() - start) / loops
    finally:
        if collecting:
            gc.enable()


def _record(benchmark: Any, result: Comparison) -> None:
    """One row a candidate in pytest-benchmark's table. It has no public way to add rows: all contact is here."""
    benchmark._mode = "compare(...)"
    _comparisons.append(result)
    if benchmark.disabled:
        return
    for name, seconds in result.samples.items():
        row = copy.copy(benchmark)
        row.name, row.fullname, row.group = name, f"{benchmark.fullname}::{name}", result.group
        row.extra_info = {"candidate": name, "subject": result.subject, "times_the_subject": result.ratio(name), **result.info}
        stats = row._make_stats(iterations=1)
        for value in seconds:
            stats.update(value)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["cpu_model"] = _cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _comparisons:
        return
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    terminalreporter.section("medians, and peers as multiples of the first")
    terminalreporter.write_line(f"{_cpu_model()}, {torch.get_num_threads()} torch threads{gpu}, torch {torch.__version__}")
    for result in _comparisons:
        terminalreporter.write_line("")
        notes = ", ".join(f"{key} {value}" for key, value in result.info.items())
        terminalreporter.write_line(result.group + (f" ({notes})" if notes else ""), bold=True)
        for name in result.samples:
            peer = "" if name == result.subject else f"{result.ratio(name):10.2f}x"
            terminalreporter.write_line(f"  {name:<40} {result.median(name) * 1e3:12.4f} ms {peer}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file_system(tmp_path: Path) -> str:
    """What kind of file system a benchmark's files lie on: "ext4", "tmpfs", …"""
    mounts = Path("/proc/mounts")
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(len(point), kind) for point, kind in points if tmp_path.resolve().is_relative_to(point)]
    return max(above)[1] if above else "unknown"
