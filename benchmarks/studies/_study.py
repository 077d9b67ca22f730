"""What every study shares: results that survive an interruption, texts, intervals, pages.

A study is a grid of cells. A cell is one arm on one unit, a text or a seed, under some settings, and its result is a few numbers. `Results`
saves each cell as soon as it is measured, so a study that was interrupted goes on where it stopped. Units are paired: every arm sees the
same texts or seeds, so intervals are of differences or ratios within units. They are t intervals, because a bootstrap over three seeds is
too short.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
CONFIDENCE = 0.95


class Results:
    """Measured cells of a study, by key, saved to a JSON file one by one.

    Args:
        path: file; None to keep the cells in memory alone, as a trial run does.
        settings: what all cells depend on: sizes, and the constants and texts of the study's modules. Versions are added. At the first new
            cell, a file of other settings is kept as NAME.before.json, or NAME.before2.json and so on.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.started = path, time.monotonic()
        self.settings = json.loads(json.dumps({**settings, "versions": versions()}))
        self.cells: dict[str, dict[str, Any]] = {}
        self._other = False  # whether the file has other settings
        if path is not None and path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                known, cells = dict(stored["settings"]), dict(stored["cells"])
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path} must hold a study's results, but does not ({error!r}); move it away or restore it.") from None
            if known == self.settings:
                self.cells = cells
            else:
                other = sorted(name for name in {**known, **self.settings} if known.get(name) != self.settings.get(name))
                print(f"{path.name} was measured with other settings ({', '.join(other)}); its cells are not used", file=sys.stderr)
                self._other = True

    def get(self, *key: object) -> dict[str, Any] | None:
        return self.cells.get(_name(key))

    def measured(self, *key: object, by: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The cell of this key, measured by `by` unless the file has it."""
        found = self.get(*key)
        if found is None:
            begin = time.monotonic()
            found = dict(by())
            found = self.cells[_name(key)] = {**found, "seconds": found.get("seconds", time.monotonic() - begin), "device": device()}
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, (int, float)))
            print(f"{time.monotonic() - self.started:6.0f} s  {_name(key)}: {numbers}", flush=True)
            self._save()
        return found

    def origin(self) -> str:
        """Where the cells were measured, and how long it took: part of a sentence of a page."""
        devices = sorted({cell["device"] for cell in self.cells.values()})
        minutes = sum(cell["seconds"] for cell in self.cells.values()) / 60
        return f"{', '.join(devices)}, torch {self.settings['versions']['torch']}; {minutes:.0f} minutes of one process"

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": self.settings, "cells": self.cells}, indent=1)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            new = Path(folder) / self.path.name
            new.write_text(text + "\n", encoding="utf-8")
            if self._other:
                names = (f".before{number if number > 1 else ''}.json" for number in itertools.count(1))
                os.replace(self.path, next(kept for name in names if not (kept := self.path.with_suffix(name)).exists()))
                self._other = False
            os.replace(new, self.path)


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
    begin = time.monotonic()
    return {**function(*given), "seconds": time.monotonic() - begin}


def _name(key: Iterable[object]) -> str:
    return " | ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Of what results depend on. The source of the standard library, which many studies read, comes with Python."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def half_precision() -> AbstractContextManager[Any]:
    """Products of matrices in bfloat16, as models of this size are trained; on recent CPUs they take a third of the time."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a study: `--quick` for a trial run that checks the machinery and writes nothing."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trial run of a few minutes at a small size; writes nothing")
    return parser


def half_width(values: list[float]) -> float:
    """Half the width of a t interval of the mean of independent values; 0 for a single one, of which nothing is known."""
    from scipy.stats import t

    if len(values) < 2:
        return 0.0
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def crossed_difference(ours: Iterable[list[float]], theirs: Iterable[list[float]]) -> tuple[float, float, float]:
    """Mean paired difference of (seeds, texts) values, with an interval for other seeds and other texts: (difference, low, high).

    Squares of the half widths over seeds and over texts add up, which is wider than it needs to be.
    """
    gap = torch.tensor(list(ours), dtype=torch.float64) - torch.tensor(list(theirs), dtype=torch.float64)
    middle = gap.mean().item()
    half = math.hypot(half_width(gap.mean(1).tolist()), half_width(gap.mean(0).tolist()))
    return middle, middle - half, middle + half


def ratio_of_means(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of two paired means over units, with its interval by the delta method: (ratio, low, high)."""
    whole = statistics.fmean(theirs)
    ratio = statistics.fmean(ours) / whole
    half = half_width([(one - ratio * other) / whole for one, other in zip(ours, theirs, strict=True)])
    return ratio, ratio - half, ratio + half


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


def stdlib_bytes() -> tuple[bytes, bytes, bytes]:
    """Source of the standard library without its tests, for training, choice of options and evaluation: whole modules, a tenth each for the
    last two.
    """
    root, parts = Path(sysconfig.get_paths()["stdlib"]), [bytearray() for _ in range(3)]
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        name = path.relative_to(root).as_posix()
        if not any(word in name for word in ("test", "site-packages", "idlelib")) and path.stat().st_size > 2000:
            parts[{0: 2, 1: 1}.get(hashlib.sha256(name.encode()).digest()[0] % 10, 0)] += path.read_bytes()
    training, choice, evaluation = map(bytes, parts)
    return training, choice, evaluation
