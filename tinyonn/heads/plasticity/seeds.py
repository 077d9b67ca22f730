"""Aggregation of the seeds of a plasticity study: means and intervals over seeds, and the number of seeds in which each head is a case.

    aggregate.json   statistics of stats.json as mean, sd and Student's t interval over seeds; cases; agreement between seeds
    aggregate.csv    one line per head: mean and sd of every column over seeds, and the number of seeds in which it is a case

A seed counts if its files are complete, belong to the seed in its folder's name, and its report was made from them. Other seeds are
listed with what they lack.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.files import digest, write_atomically
from ..._io.records import short
from ...errors import InputError
from ..step_files import StepFileError, check_fields, csv_text, json_text, read_record
from ..study import ADDED_OPTIONS, AGGREGATE, AGGREGATE_TABLE, MEASURE_STEP, MEASURED, PAGE, REPORT_STEP, STATS, TRAIN_STEP, TRAINED
from .cases import KINDS, find_cases
from .correlation import CONFIDENCE, mean_interval, spearman
from .records import check_seed, read_measured, read_subset, read_trained, seed_folders
from .summary import COLUMNS, PAIRS, SOURCES, TAYLOR_PAIRS, HeadTable, acceptance, read_heads

STEPS = {TRAINED: TRAIN_STEP, MEASURED: MEASURE_STEP, STATS: REPORT_STEP}
# Fields that must be equal in all seeds.
SHARED_FACTS = ("model", "top_k", "high", "low")
AGREEMENT_COLUMNS = ("I_pre", "I_post", "G_pre", "U", "Urel")


class SeedsDifferError(InputError):
    """Complete seeds that cannot be aggregated: they have different models, heads, or options of the report."""


@dataclass(frozen=True)
class Seed:
    """A complete seed: name and number of its folder, stats.json, columns, and cases."""

    name: str
    number: int
    stats: dict[str, Any]
    subset: list[Any]
    table: HeadTable
    kinds: list[str]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the training."""
        return {**ADDED_OPTIONS, **self.stats["options"]}


def aggregate(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes aggregate.json and aggregate.csv over all complete seeds of OUTPUT/TASK.

    Args:
        folder: folder with seed0, seed1, …

    Returns:
        Content of aggregate.json.

    Raises:
        InputError: no seed is complete, scipy is missing, or the seeds have different models, heads or options (SeedsDifferError); the
            message names the seeds. Nothing is written then, and the files of an earlier aggregation are deleted.
    """
    root = Path(folder)
    for name in (AGGREGATE, AGGREGATE_TABLE, PAGE):  # so that no old file looks current if the aggregation fails
        (root / name).unlink(missing_ok=True)
    seeds, incomplete = _complete_seeds(root)
    if not seeds:
        held = [f"{seed['folder']}: {seed['found']}; run {seed['step']}" for seed in incomplete]
        more = f" (and {len(held) - 1} more)" if len(held) > 1 else ""
        raise InputError(f"{root} must hold at least one complete seed, got {held[0] + more if held else 'no folder seed0, seed1 …'}.")
    _check_alike(root, seeds)
    first = seeds[0]
    found: dict[str, Any] = {
        "task": root.resolve().name,
        **{name: first.stats[name] for name in SHARED_FACTS},
        "counts": first.table.counts,
        "seeds": [{"folder": seed.name, "seed": seed.number} for seed in seeds],
        "incomplete": incomplete,
        "notes": _notes(seeds),
        "interval": {"method": "Student's t over seeds, clipped to the quantity's range", "confidence": CONFIDENCE},
        "pairs": [_pair(seeds, "pairs", number) for number in range(len(first.stats["pairs"]))],
        "taylor": [_pair(seeds, "taylor", number) for number in range(len(first.stats["taylor"]))],
        "case_counts": {name: _over([seed.kinds.count(kind) for seed in seeds], 0.0) for name, kind in KINDS.items()},
        "acceptance": _acceptance(seeds),
        "agreement": [_agreement(seeds, column) for column in AGREEMENT_COLUMNS],
        "cases": {name: _frequent(seeds, kind) for name, kind in KINDS.items()},
    }
    write_atomically(root / AGGREGATE_TABLE, _csv(seeds))
    write_atomically(root / AGGREGATE, json_text(found))
    return found


def _complete_seeds(root: Path) -> tuple[list[Seed], list[dict[str, str]]]:
    seeds: list[Seed] = []
    incomplete: list[dict[str, str]] = []
    for number, path in seed_folders(root):
        missing = next((name for name in STEPS if not (path / name).exists()), None)
        try:
            if missing is None:
                seeds.append(_seed(path, number))
                continue
            found, step = f"no {missing}", STEPS[missing]
        except StepFileError as error:
            found, step = error.found, error.step
        incomplete.append({"folder": path.name, "found": found, "step": step})
    return seeds, incomplete


def _seed(path: Path, number: int) -> Seed:
    """A seed whose three steps are complete; StepFileError names a file that is damaged, or of another seed or report."""
    check_seed(path, read_trained(path))
    read_measured(path)
    stats = _read_stats(path / STATS)
    table = read_heads(path)
    changed = next((name for name in SOURCES if stats["inputs"].get(name) != digest(path / name)), None)
    if changed is not None:
        raise StepFileError(path / changed, f"be the file that {STATS} was made from, got another", REPORT_STEP)
    kinds = find_cases(table.columns["I_pre"], table.columns["Urel"], stats["high"], stats["low"]).kinds
    return Seed(path.name, number, stats, read_subset(path), table, kinds)


def _read_stats(path: Path) -> dict[str, Any]:
    """Content of stats.json, with checks of the fields used here."""
    fields = {"inputs": "an object", "options": "an object", "model": "text", "pairs": "a list", "taylor": "a list"}
    stats = read_record(path, {**fields, "top_k": "a whole number", "high": "a number", "low": "a number"}, REPORT_STEP)
    check_fields(path, stats["options"], {"model_path": "text"}, REPORT_STEP, again=True)
    if not 0 <= stats["low"] < stats["high"] <= 100:
        got = f"low {stats['low']} and high {stats['high']}"
        raise StepFileError(path, f"have percentiles with 0 ≤ low < high ≤ 100, got {got}", REPORT_STEP, again=True)
    for group, names in (("pairs", PAIRS), ("taylor", TAYLOR_PAIRS)):
        held = [(row.get("x"), row.get("y")) if isinstance(row, dict) else row for row in stats[group]]
        if held != list(names):
            raise StepFileError(path, f"have the pairs of columns of a report in {group}, got {short(held)}", REPORT_STEP, again=True)
        for row in stats[group]:
            check_fields(path, row, {"rho": "a number or null", "overlap": "an object"}, REPORT_STEP, again=True)
            overlap = {"k": "a whole number", "share": "a number or null", "reason": "text or null"}
            check_fields(path, row["overlap"], overlap, REPORT_STEP, again=True)
    return stats


def _check_alike(root: Path, seeds: Sequence[Seed]) -> None:
    first = seeds[0]
    for seed in seeds[1:]:
        for name in SHARED_FACTS:
            # Two models may have the same name, but not the same path.
            ours, theirs = (its.options["model_path"] if name == "model" else its.stats[name] for its in (first, seed))
            if theirs != ours:
                raise SeedsDifferError(f"{root} must have one {name} in all seeds, got {ours} in {first.name} and {theirs} in {seed.name}.")
        if seed.table.places != first.table.places:
            shapes = [f"{its.table.counts['layers']} layers and {its.table.counts['heads']} heads in {its.name}" for its in (first, seed)]
            raise SeedsDifferError(f"{root} must have the same heads in all seeds, got {' and '.join(shapes)}.")


def _notes(seeds: Sequence[Seed]) -> list[str]:
    notes = []
    if len(seeds) == 1:
        notes.append("One seed has no interval: run others to see the variation between runs.")
    other = next((seed for seed in seeds[1:] if seed.subset != seeds[0].subset), None)
    if other is not None:
        notes.append(f"The seeds were measured on different rows (eval_subset.json): {seeds[0].name} and {other.name}.")
    for name, value in seeds[0].options.items():
        other = next((seed for seed in seeds if seed.options.get(name) != value), None)
        if name != "seed" and other is not None:
            values = f"{value} in {seeds[0].name} and {other.options.get(name)} in {other.name}"
            notes.append(f"More than the seed differs in training: {name} is {values}.")
    return notes


def _over(values: Sequence[float | None], lowest: float = -np.inf, highest: float = np.inf) -> dict[str, Any]:
    """A number of each seed, with mean and interval. Seeds without it are None in `values`, and are ignored in both."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    return {**mean_interval(known, lowest, highest), "values": list(values)}


def _pair(seeds: Sequence[Seed], group: str, number: int) -> dict[str, Any]:
    rows = [seed.stats[group][number] for seed in seeds]
    k = rows[0]["overlap"]["k"]
    overlap = _over([row["overlap"]["share"] for row in rows], 0.0, 1.0)
    return {
        "x": rows[0]["x"],
        "y": rows[0]["y"],
        "rho": _over([row["rho"] for row in rows], -1.0, 1.0),
        "overlap": {"k": k, "chance": k / len(seeds[0].table.places), **overlap},
    }


def _acceptance(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    """The expectations, with the number of seeds that meet each."""
    judged = [acceptance(seed.stats["pairs"], {name: seed.kinds.count(kind) for name, kind in KINDS.items()}) for seed in seeds]
    return [
        {
            **{name: rows[0][name] for name in ("figure", "rule", "limit")},
            "values": [row["value"] for row in rows],
            "met": sum(row["met"] is True for row in rows),
            "missed": sum(row["met"] is False for row in rows),
        }
        for rows in zip(*judged, strict=True)
    ]


def _agreement(seeds: Sequence[Seed], column: str) -> dict[str, Any]:
    """Mean rank correlation of a column between all pairs of seeds, which shows whether another run finds the same heads."""
    pairs = itertools.combinations((seed.table.columns[column] for seed in seeds), 2)
    found = [rho for rho in (spearman(a, b) for a, b in pairs) if rho is not None]
    return {"column": column, "rho": float(np.mean(found)) if found else None, "pairs": len(found)}


def _seeds_in_which(seeds: Sequence[Seed], kind: str) -> list[int]:
    """Number of seeds in which each head is a case of a kind."""
    return [sum(its == kind for its in kinds) for kinds in zip(*(seed.kinds for seed in seeds), strict=True)]


def _frequent(seeds: Sequence[Seed], kind: str) -> list[dict[str, Any]]:
    """Heads that are cases of a kind in some seed, most frequent first."""
    rows = []
    for number, (place, count) in enumerate(zip(seeds[0].table.places, _seeds_in_which(seeds, kind), strict=True)):
        if count:
            means = {f"{name}_mean": float(np.mean([seed.table.columns[name][number] for seed in seeds])) for name in ("I_pre", "Urel")}
            rows.append({**place._asdict(), "seeds": count, "share": count / len(seeds), **means})
    return sorted(rows, key=lambda row: -row["seeds"])


def _csv(seeds: Sequence[Seed]) -> str:
    places = seeds[0].table.places
    columns: dict[str, Sequence[object]] = {**seeds[0].table.numbers, "seeds": [len(seeds)] * len(places)}
    for name in COLUMNS:
        values = np.stack([seed.table.columns[name] for seed in seeds])
        columns[f"{name}_mean"] = values.mean(axis=0)
        columns[f"{name}_sd"] = values.std(axis=0, ddof=1) if len(seeds) > 1 else [""] * len(places)
    return csv_text(columns | {name: _seeds_in_which(seeds, kind) for name, kind in KINDS.items()})
