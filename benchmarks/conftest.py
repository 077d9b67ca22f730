"""Fixtures of all benchmarks: interleaved timing, one table row per candidate, ratios of medians.

A benchmark compares candidates. Their results are checked against each other, then they are timed in turn, round after round, so that
a slowdown of the machine affects all of them:

    def test_token_grad_norms_against_einsum(compare):
        result = compare(
            "token grad norms, 512 x 512 x 512",                   # the group: one table
            {"tinyonn": lambda: token_grad_norms(x, g), "einsum": lambda: einsum_norms(x, g)},   # ours first
            check=lambda out: torch.testing.assert_close(out["tinyonn"], out["einsum"]),
            info={"goal": "einsum >= 1000x"},                      # realised counts, bytes, the goal
        )
        result.ratio("einsum")                                     # median of einsum / median of tinyonn

        result.info["share of peak"] = 0.9                         # computed after the measurement

The ratios and `info` are in `extra_info` of the JSON (`--benchmark-json`), and are printed after pytest-benchmark's tables. `gpu.py`
calls the same functions with its own fixtures.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyonn.testing.timing import Comparison, cpu_model, measure
from tinyonn.testing.timing import peak_megabytes as peak_of

sys.path.append(str(Path(__file__).parent))  # benchmarks import each other's cases

_comparisons: list[Comparison] = []


@pytest.fixture
def compare(benchmark: Any) -> Iterator[Callable[..., Comparison]]:
    """`compare(group, candidates, check=None, *, before=None, rounds=None, info=None, optional=()) -> Comparison`; see `measure`.

    A candidate that returns an object with `seconds` times itself, for example to exclude opening and removing files.
    With `--benchmark-disable`, every candidate runs once and is checked; medians are the time of that call.
    """
    rows: list[tuple[Comparison, dict[str, Any]]] = []

    def run(*args: Any, **options: Any) -> Comparison:
        result = measure(*args, timed=not benchmark.disabled, **options)
        _comparisons.append(result)
        rows.extend((result, extra) for extra in _add_rows(benchmark, result))
        return result

    yield run
    for result, extra in rows:  # entries added after the measurement
        extra.update(result.info)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the tensors; `make gpu` runs only the GPU variants."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.fixture
def peak_megabytes(device: str) -> Callable[[Callable[[], Any]], float]:
    """`peak_megabytes(call)`: peak of the memory that one call allocates."""
    return partial(peak_of, device=device)


def _add_rows(benchmark: Any, result: Comparison) -> list[dict[str, Any]]:
    """Adds one row per candidate to pytest-benchmark's table and returns their notes. The only use of its private interface."""
    benchmark._mode = "compare(...)"
    if benchmark.disabled:
        return []
    notes = []
    for name, seconds in result.samples.items():
        row = copy.copy(benchmark)
        row.name, row.fullname, row.group = name, f"{benchmark.fullname}::{name}", result.group
        row.extra_info = {"candidate": name, "subject": result.subject, "times_the_subject": result.ratio(name)}
        stats = row._make_stats(iterations=1)
        for value in seconds:
            stats.update(value)
        notes.append(row.extra_info)
    return notes


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["cpu_model"] = cpu_model()
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _comparisons:
        return
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    terminalreporter.section("medians, and peers as multiples of the first")
    terminalreporter.write_line(f"{cpu_model()}, {torch.get_num_threads()} torch threads{gpu}, torch {torch.__version__}")
    for result in _comparisons:
        terminalreporter.write_line("")
        group, *rows = result.lines()
        terminalreporter.write_line(group, bold=True)
        for row in rows:
            terminalreporter.write_line(row)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file_system(tmp_path: Path) -> str:
    """Type of the file system of the benchmark's files: "ext4", "tmpfs", …"""
    mounts = Path("/proc/mounts")
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(len(point), kind) for point, kind in points if tmp_path.resolve().is_relative_to(point)]
    return max(above)[1] if above else "unknown"
