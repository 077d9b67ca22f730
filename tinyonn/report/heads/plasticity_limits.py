"""Limits of the numbers of a plasticity run: a model no better than its commonest class, few rows, few heads.

A page shows these notes above its verdict. The module also computes the figures of heads with unrelated importance and change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._io.records import short
from ..._io.units import counted
from ...heads.step_files import StepFileError, read_record
from ...heads.study import MEASURE_AGAIN, MEASURE_STEP, MEASURED, SUBSET, TRAIN_AGAIN, TRAIN_STEP, TRAINED

_FEW_ROWS = 100  # with fewer, the standard error of an accuracy can exceed 5 %
_UNSURE = 0.05  # above this chance of missing the limit, an overlap decides little


@dataclass(frozen=True)
class MeasuredRows:
    """Rows that heads were measured on.

    Attributes:
        rows: number of rows.
        commonest: name of the commonest class.
        count: number of rows of that class.
        accuracy: accuracy of the trained model, 0 … 1.
    """

    rows: int
    commonest: str
    count: int
    accuracy: float

    @property
    def share(self) -> float:
        """Accuracy of always predicting the commonest class."""
        return self.count / self.rows

    @property
    def error(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.rows)

    @property
    def told(self) -> str:
        """The commonest class with its share, for a list of facts."""
        return f"{self.commonest}: {self.share:.4f} ({self.count:,} of {self.rows:,})"


def read_rows(folder: Path) -> MeasuredRows:
    """Reads the measured rows of OUTPUT/TASK/seedN.

    Raises:
        InputError: eval_subset.json, measure.json or train.json is missing or not as its step writes it; the message names the step.
    """
    labels = read_record(folder / SUBSET, {"labels": "a list"}, MEASURE_STEP, MEASURE_AGAIN)["labels"]
    names = read_record(folder / TRAINED, {"labels": "a list"}, TRAIN_STEP, TRAIN_AGAIN)["labels"]
    accuracy = float(read_record(folder / MEASURED, {"base_accuracy_post": "a number"}, MEASURE_STEP)["base_accuracy_post"])
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names)]
    if wrong or not labels:
        rule = f"have numbers of the {len(names)} classes as labels, got {short(wrong[0]) if wrong else 'none'}"
        raise StepFileError(folder / SUBSET, rule, MEASURE_AGAIN)
    label, count = Counter(sorted(labels)).most_common(1)[0]
    return MeasuredRows(len(labels), str(names[label]), count, accuracy)


def limits_of_rows(seeds: Mapping[str, MeasuredRows]) -> list[str]:
    """Notes on the limits of the measured rows.

    Args:
        seeds: rows by the name of the seed's folder; a single seed is not named.
    """
    many = len(seeds) > 1
    no_better = {name: its for name, its in seeds.items() if its.accuracy <= its.share}
    hardly = {name: its for name, its in seeds.items() if its.share < its.accuracy < its.share + 2 * its.error}
    lines = []
    for found, said in ((no_better, "does not beat"), (hardly, "hardly beats")):
        if not found:
            continue
        where = f" in {len(found)} of {len(seeds)} seeds" if many else ""
        each = "; ".join(_against(name if many else "It", its) for name, its in found.items())
        lines.append(
            f"The trained model {said} always predicting the commonest class{where}. {each}. The importance and the change "
            "of its heads then tell little about the task."
        )
    fewest = min(its.rows for its in seeds.values())
    if fewest < _FEW_ROWS:
        verb = "row was" if fewest == 1 else "rows were"
        lines.append(
            f"Only {fewest} {verb} measured: one row changes an accuracy by {1 / fewest:.3f}, and much of a head's loss increase, a mean "
            "over so few rows, is chance."
        )
    return lines


def _against(name: str, its: MeasuredRows) -> str:
    right = f"{its.accuracy * its.rows:,.0f} of {counted(its.rows, 'measured row')}"
    error = f", with a standard error of {its.error:.1%}" if its.accuracy > its.share else ""
    return (
        f"{name} is right on {right} ({its.accuracy:.1%}{error}), the constant answer “{its.commonest}” on {its.count:,} ({its.share:.1%})"
    )


def limits_of_heads(heads: int, k: int, max_overlap: float, max_rho: float, rhos: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Notes on the limits of this number of heads.

    Args:
        heads: number of heads of the model.
        k: number of heads in each list of an overlap.
        max_overlap, max_rho: the original study's figures.
        rhos: name and `low`, `high` of the judged rank correlations; None without an interval.
    """
    lines = []
    missed = chance_of_missing(heads, k, max_overlap)
    if k == heads:
        lines.append(f"The lists of highest heads hold all {heads:,} heads, so every overlap is 1 and means nothing. Lower --top-k.")
    elif missed > _UNSURE:
        lines.append(
            f"With {heads:,} heads, two random lists of {k} share {k / heads:.0%} of their heads on average, and miss the figure of "
            f"{max_overlap:g} in {missed:.0%} of draws: an overlap near {k / heads:.2f} is chance, whether it meets the figure or not."
        )
    lines += [
        f"The interval of ρ({name}), {rho['low']:.2f} to {rho['high']:.2f}, contains the figure of {max_rho:g}, so ρ may lie on either "
        "side of it."
        for name, rho in rhos
        if rho["low"] is not None and rho["high"] is not None and rho["low"] < max_rho <= rho["high"]
    ]
    return lines


def chance_of_missing(heads: int, k: int, limit: float) -> float:
    """Probability that two random lists of k heads share at least the fraction `limit` of them."""
    ways = sum(math.comb(k, shared) * math.comb(heads - k, k - shared) for shared in range(k + 1) if shared / k >= limit)
    return ways / math.comb(heads, k)


def if_unrelated(figure: str, stats: Mapping[str, Any]) -> str:
    """Average of an acceptance figure for unrelated importance and change.

    Args:
        figure: name of the figure in `acceptance`.
        stats: contents of stats.json or aggregate.json.
    """
    heads = stats["counts"]["heads"]
    if figure.startswith("rho("):
        return "0"
    if figure.startswith("overlap("):
        return f"{stats['pairs'][0]['overlap']['k'] / heads:.3f}"
    return f"{heads * (1 - stats['high'] / 100) * stats['low'] / 100:.1f}"


def judged_rhos(stats: Mapping[str, Any], judged: Sequence[bool]) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and intervals of the rank correlations of stats.json or aggregate.json that the study's figures judge."""
    pairs = [pair for pair, its in zip(stats["pairs"], judged, strict=True) if its]
    return [(f"{pair['x']}, {pair['y']}", pair["rho"] if isinstance(pair["rho"], Mapping) else pair) for pair in pairs]


def pair_name(pair: Mapping[str, Any]) -> str:
    """Name of a pair of columns on charts."""
    return f"{pair['x']}, {pair['y']}"


def study_limits(acceptance: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The original study's highest rank correlation and overlap."""
    limits = {row["figure"].partition("(")[0]: row["limit"] for row in acceptance}
    return limits["rho"], limits["overlap"]


def is_judged(pair: Mapping[str, Any], acceptance: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the original study has figures for a pair of columns."""
    return any(row["figure"] == f"rho({pair_name(pair)})" for row in acceptance)


def judged_line(pairs: Sequence[Mapping[str, Any]], acceptance: Sequence[Mapping[str, Any]]) -> str:
    """Sentence on the pairs of columns that the original study's figures judge, and those that they do not."""
    judged, others = ([f"({pair_name(pair)})" for pair in pairs if is_judged(pair, acceptance) is wanted] for wanted in (True, False))
    verb = "is" if len(others) == 1 else "are"
    rest = f"; {' and '.join(others)} {verb} shown but not judged" if others else ""
    return f"The figures judge {' and '.join(judged)}, and the numbers of cases{rest}."


def limits_of_numbers(stats: Mapping[str, Any]) -> list[str]:
    """Notes on the limits of the statistics in stats.json or aggregate.json."""
    max_rho, max_overlap = study_limits(stats["acceptance"])
    judged = [is_judged(pair, stats["acceptance"]) for pair in stats["pairs"]]
    k = stats["pairs"][0]["overlap"]["k"]
    return limits_of_heads(stats["counts"]["heads"], k, max_overlap, max_rho, judged_rhos(stats, judged))
