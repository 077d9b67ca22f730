"""What every study shares: results that survive an interruption, texts, intervals, pages.

A study is a grid of cells. A cell is one arm on one unit, a text or a seed, under some settings, and its result is a few numbers. `Results`
saves each cell as soon as it is measured, so a study that was interrupted goes on where it stopped. Units are paired: every arm sees the
same texts or seeds, so intervals are of differences or ratios within units.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
RESAMPLES = 10_000


class Results:
    """Measured cells of a study, by key, saved to a JSON file one by one.

    Args:
        path: file; None to keep the cells in memory alone, as a trial run does.
        settings: what all cells depend on. A file of other settings is started anew.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings, self.started = path, json.loads(json.dumps(settings)), time.monotonic()
        self.cells: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == self.settings:
                self.cells, self.seconds = stored["cells"], stored["seconds"]

    def get(self, *key: object) -> dict[str, Any] | None:
        return self.cells.get(_name(key))

    def measured(self, *key: object, by: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The cell of this key, measured by `by` unless the file has it."""
        found = self.get(*key)
        if found is None:
            begin = time.monotonic()
            found = self.cells[_name(key)] = dict(by())
            self.seconds += time.monotonic() - begin
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, (int, float)))
            print(f"{time.monotonic() - self.started:6.0f} s  {_name(key)}: {numbers}", flush=True)
            self._save()
        return found

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": self.settings, "machine": machine(), "seconds": round(self.seconds), "cells": self.cells}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, self.path)


class Job(NamedTuple):
    """A cell and the function that measures it, of a module, with its arguments."""

    key: tuple[object, ...]
    by: Callable[..., Mapping[str, Any]]
    given: tuple[Any, ...]


def measure_all(results: Results, jobs: Iterable[Job], processes: int) -> None:
    """Measures the cells that are missing, `processes` at a time and in any order."""
    missing = [job for job in jobs if results.get(*job.key) is None]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_on_one_core, job.by, *job.given): job for job in missing}
        try:
            for done in as_completed(running):
                results.measured(*running[done].key, by=done.result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on_one_core(function: Callable[..., Mapping[str, Any]], *given: Any) -> Mapping[str, Any]:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return function(*given)


def _name(key: Iterable[object]) -> str:
    return " | ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return {"device": name, "machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a study: `--quick` for a trial run that checks the machinery and writes nothing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trial run of a few minutes at a small size; writes nothing")
    return parser


def interval(statistic: Callable[[Tensor], Tensor], units: int, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic over paired units.

    Args:
        statistic: (R, U) indices of units -> (R,) values.
        units: U.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(units, (RESAMPLES, units), generator=generator)
    low, high = statistic(drawn).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def crossed_difference(ours: Iterable[list[float]], theirs: Iterable[list[float]]) -> tuple[float, float, float]:
    """Mean paired difference of (seeds, texts) values with its 95 % bootstrap interval, over seeds and over texts."""
    gap = torch.tensor(list(ours), dtype=torch.float64) - torch.tensor(list(theirs), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    seeds, texts = (torch.randint(size, (RESAMPLES, size), generator=generator) for size in gap.shape)
    means = torch.stack([gap[one][:, two].mean() for one, two in zip(seeds, texts, strict=True)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return gap.mean().item(), low, high


def ratio_of_means(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of two paired means over units, with its interval: (ratio, low, high)."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    low, high = interval(lambda drawn: a[drawn].mean(-1) / b[drawn].mean(-1), len(a))
    return (a.mean() / b.mean()).item(), low, high


def mean_difference(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean paired difference over units, with its interval: (difference, low, high)."""
    gap = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    low, high = interval(lambda drawn: gap[drawn].mean(-1), len(gap))
    return gap.mean().item(), low, high


def table(head: list[str], rows: Iterable[list[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def module_text(name: str) -> str:
    """Source of a module of the standard library, such as "argparse.py"."""
    return (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")


def prose_text() -> str:
    """English prose of the standard library: the language reference that `help()` prints, without its markup of code blocks."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def stdlib_bytes() -> tuple[bytes, bytes]:
    """Source of the standard library without its tests, for training and for the evaluation: whole modules, a tenth for the latter."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), [bytearray(), bytearray()]
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        name = path.relative_to(root).as_posix()
        if not any(word in name for word in ("test", "site-packages", "idlelib")) and path.stat().st_size > 2000:
            parts[hashlib.sha256(name.encode()).digest()[0] % 10 == 0] += path.read_bytes()
    return bytes(parts[0]), bytes(parts[1])
