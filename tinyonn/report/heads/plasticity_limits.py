"""Limits of the numbers of a plasticity run: a model no better than its commonest class, few rows, few heads.

A page shows these notes above its verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._io.records import short
from ..._io.units import counted
from ...heads.step_files import StepFileError, read_record
from ...heads.study import MEASURE_AGAIN, MEASURE_STEP, MEASURED, SUBSET, TRAIN_AGAIN, TRAIN_STEP, TRAINED
from .plasticity_parts import is_judged, pair_name, study_limits

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


def limits_of_numbers(stats: Mapping[str, Any]) -> list[str]:
    """Notes on the limits of the statistics in stats.json or aggregate.json."""
    max_rho, max_overlap = study_limits(stats)
    heads, k = stats["counts"]["heads"], stats["pairs"][0]["overlap"]["k"]
    lines = []
    missed = chance_of_missing(heads, k, max_overlap)
    if k == heads:
        lines.append(f"The lists of highest heads hold all {heads:,} heads, so every overlap is 1 and means nothing. Lower --top-k.")
    elif missed > _UNSURE:
        lines.append(
            f"With {heads:,} heads, two random lists of {k} share {k / heads:.0%} of their heads on average, and miss the figure of "
            f"{max_overlap:g} in {missed:.0%} of draws: an overlap near {k / heads:.2f} is chance, whether it meets the figure or not."
        )
    for pair in (pair for pair in stats["pairs"] if is_judged(pair, stats)):
        rho = pair["rho"] if isinstance(pair["rho"], Mapping) else pair
        if rho["low"] is not None and rho["high"] is not None and rho["low"] < max_rho <= rho["high"]:
            lines.append(
                f"The interval of ρ({pair_name(pair)}), {rho['low']:.2f} to {rho['high']:.2f}, contains the figure of {max_rho:g}, so ρ "
                "may lie on either side of it."
            )
    return lines


def chance_of_missing(heads: int, k: int, limit: float) -> float:
    """Probability that two random lists of k heads share at least the fraction `limit` of them."""
    ways = sum(math.comb(k, shared) * math.comb(heads - k, k - shared) for shared in range(k + 1) if shared / k >= limit)
    return ways / math.comb(heads, k)
