"""The report step of a plasticity study: the files of `measure`, joined by head, with statistics and cases.

    heads.csv    one line per head: importance, gradient, update and case
    stats.json   rank correlations and overlaps of importance with change, and of Taylor with exact importance; acceptance figures
    cases.json   heads that are important-but-static or plastic-but-unimportant

No model is loaded; all input comes from the files of one OUTPUT/TASK/seedN/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._io.files import digest, write_atomically
from ..._io.locks import locked
from ..._io.records import field_names
from ...errors import InputError, reason, shown
from ..step_files import StepFileError, csv_text, is_finite, json_text
from ..study import CASES, GRADIENTS, HEADS, IMPORTANCE_POST, IMPORTANCE_PRE, MEASURE_STEP, STATS, UPDATE
from .cases import KINDS, case_lists, find_cases
from .config import PlasticityConfig
from .correlation import BOOTSTRAP_SEED, CONFIDENCE, RESAMPLES, Floats, rank_correlation, top_overlap
from .records import check_parts, check_seed, read_measured, read_subset, read_trained

# File of `measure` -> its field -> column of heads.csv.
SOURCES: dict[str, dict[str, str]] = {
    **{
        file: {"loss_increase": f"I_{when}", **{name: f"{name}_{when}" for name in ("accuracy_drop", "taylor", "taylor_abs")}}
        for file, when in ((IMPORTANCE_PRE, "pre"), (IMPORTANCE_POST, "post"))
    },
    GRADIENTS: {"gradient_norm": "G_pre", "fisher": "fisher_pre"},
    UPDATE: {name: name for name in ("Uq", "Uk", "Uv", "Uo", "U", "Urel")},
}
COLUMNS = (
    *("I_pre", "I_post", "accuracy_drop_pre", "accuracy_drop_post", "taylor_pre", "taylor_abs_pre", "taylor_post", "taylor_abs_post"),
    *("G_pre", "fisher_pre", "Uq", "Uk", "Uv", "Uo", "U", "Urel"),
)
PAIRS = (("I_pre", "U"), ("I_pre", "Urel"), ("I_pre", "G_pre"))
TAYLOR_PAIRS = (("I_pre", "taylor_pre"), ("I_pre", "taylor_abs_pre"), ("I_post", "taylor_post"), ("I_post", "taylor_abs_post"))
# Expectations for the pairs of importance and change: limits that express that importance hardly predicts change.
JUDGED = PAIRS[:2]
MAX_RHO, MAX_OVERLAP, MIN_CASES = 0.5, 0.3, 3


class Place(NamedTuple):
    """A head of the model."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadTable:
    """Measurements per head.

    Attributes:
        places: heads in order of layer and number.
        columns: name in COLUMNS -> (heads,) numbers.
    """

    places: list[Place]
    columns: dict[str, Floats]

    @property
    def counts(self) -> dict[str, int]:
        """Number of heads and of layers."""
        return {"heads": len(self.places), "layers": len({place.layer for place in self.places})}

    @property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        """Columns "layer" and "head"."""
        return dict(zip(Place._fields, zip(*self.places, strict=True), strict=True))


@dataclass(frozen=True)
class PlasticitySummary:
    """Result of the report step: contents of stats.json and cases.json."""

    folder: Path
    stats: dict[str, Any]
    cases: dict[str, Any]


def summarise(
    study: PlasticityConfig | str | os.PathLike[str], *, top_k: int | None = None, high: float | None = None, low: float | None = None
) -> PlasticitySummary:
    """Writes heads.csv, stats.json and cases.json of one seed.

    Args:
        study: options of the study, or its folder OUTPUT/TASK/seedN.
        top_k: number of heads in the overlap, at most all; None for the study's option, or the default of 20.
        high, low: percentiles of the cases; None for the study's options, or the defaults of 90 and 30.

    Raises:
        InputError: an option is invalid, scipy is missing, another run uses the folder, or a file is missing, incomplete or not the one
            that `measure` wrote; the message names the file and the step to run. Nothing is written then.
    """
    options = study if isinstance(study, PlasticityConfig) else PlasticityConfig  # the class attributes are the defaults
    root = study.folder if isinstance(study, PlasticityConfig) else Path(study)
    top_k = options.top_k if top_k is None else top_k
    high, low = options.high if high is None else high, options.low if low is None else low
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}.")
    if not 0 <= low < high <= 100:
        raise InputError(f"low and high must be percentiles with 0 ≤ low < high ≤ 100, got low {low:g} and high {high:g}.")
    read_measured(root)  # before the lock, which would create the folder
    with locked(root):
        return _summarise(root, top_k, high, low)


def _summarise(root: Path, top_k: int, high: float, low: float) -> PlasticitySummary:
    measured, trained = read_measured(root), read_trained(root)
    read_subset(root)
    check_seed(root, trained)
    table = read_heads(root)
    for name in ("layers", "heads"):
        if measured[name] != table.counts[name]:
            raise _broken(root / next(iter(SOURCES)), f"have the {measured[name]} {name} that measure.json states", str(table.counts[name]))
    check_parts(root, SOURCES)
    cases = find_cases(table.columns["I_pre"], table.columns["Urel"], high, low)
    rows = [
        {**place._asdict(), **{name: float(table.columns[name][number]) for name in COLUMNS}} for number, place in enumerate(table.places)
    ]
    listed = case_lists(cases, rows, high, low)
    options = trained["options"]
    stats = {
        "model": measured["model"],
        "task": root.resolve().parent.name,
        "seed": options["seed"],
        "options": options,
        **statistics(table, top_k, cases.kinds),
        "top_k": top_k,
        "high": high,
        "low": low,
        "inputs": {name: digest(root / name) for name in SOURCES},
    }
    columns = {name: table.columns[name] for name in COLUMNS}
    write_atomically(root / HEADS, csv_text({**table.numbers, **columns, "kind": cases.kinds}))
    write_atomically(root / CASES, json_text(listed))
    write_atomically(root / STATS, json_text(stats))  # last, because it marks the step as complete
    return PlasticitySummary(root, stats, listed)


def statistics(table: HeadTable, top_k: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Numbers of stats.json that depend on the heads alone.

    Args:
        table: measured columns.
        top_k: number of heads in the overlap.
        kinds: kind of each head, as in `Cases.kinds`.
    """
    pairs = [_pair(table, names, top_k) for names in PAIRS]
    counts = table.counts | {name: kinds.count(kind) for name, kind in KINDS.items()}
    return {
        "counts": counts,
        "pairs": pairs,
        "taylor": [_pair(table, names, top_k) for names in TAYLOR_PAIRS],
        "acceptance": acceptance(pairs, counts),
        "interval": {
            "method": "percentile bootstrap over heads, paired",
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": BOOTSTRAP_SEED,
        },
    }


def acceptance(pairs: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The expectations, and whether this run meets them; `met` is None if the number could not be computed."""
    rows: list[dict[str, Any]] = []
    for pair in (pair for pair in pairs if (pair["x"], pair["y"]) in JUDGED):
        share = pair["overlap"]["share"] if pair["overlap"]["reason"] is None else None
        for what, value, limit in (("rho", pair["rho"], MAX_RHO), ("overlap", share, MAX_OVERLAP)):
            met = None if value is None else value < limit
            rows.append({"figure": f"{what}({pair['x']}, {pair['y']})", "rule": f"< {limit:g}", "limit": limit, "value": value, "met": met})
    rows += [
        {"figure": f"{kind} heads", "rule": f">= {MIN_CASES}", "limit": MIN_CASES, "value": counts[name], "met": counts[name] >= MIN_CASES}
        for name, kind in KINDS.items()
    ]
    return rows


def read_heads(folder: Path) -> HeadTable:
    """Joins the files of `measure` by head.

    Raises:
        InputError: a file is missing, does not have one line for every head of the others, or a number is not finite.
    """
    found = {name: _read_lines(folder / name, list(fields)) for name, fields in SOURCES.items()}
    places = sorted(set().union(*found.values()))
    for name, lines in found.items():
        lacking = [place for place in places if place not in lines]
        if lacking:
            raise _broken(
                folder / name,
                f"have one line for each of {len(places)} heads",
                f"{len(lines)} (first missing: layer {lacking[0].layer} head {lacking[0].head})",
            )
    expected = {Place(0, 0)}
    for place in places:
        if place not in expected:
            raise _broken(
                folder / next(iter(SOURCES)), "number layers and heads from 0 without a gap", f"layer {place.layer} head {place.head}"
            )
        expected = {Place(place.layer, place.head + 1), Place(place.layer + 1, 0)}
    columns = {
        column: np.array([found[name][place][field] for place in places], dtype=np.float64)
        for name, fields in SOURCES.items()
        for field, column in fields.items()
    }
    return HeadTable(places, columns)


def _pair(table: HeadTable, names: tuple[str, str], top_k: int) -> dict[str, Any]:
    x, y = (table.columns[name] for name in names)
    return {"x": names[0], "y": names[1], **vars(rank_correlation(x, y, names)), "overlap": vars(top_overlap(x, y, top_k, names))}


def _read_lines(path: Path, fields: list[str]) -> dict[Place, dict[str, float]]:
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StepFileError(path, "exist, got no such file", MEASURE_STEP) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, "be a text file that can be read", reason(error)) from error
    found: dict[Place, dict[str, float]] = {}
    for number, line in enumerate(content.removesuffix("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken(path, "hold one JSON object a line", f"line {number}: {reason(error, 80)}") from error
        if not isinstance(record, dict) or not {"layer", "head", *fields} <= record.keys():
            held = field_names(record) if isinstance(record, dict) else type(record).__name__
            raise _broken(path, f"have the fields layer, head, {', '.join(fields)} in every line", f"line {number}: {held}")
        for name in ("layer", "head"):
            if not isinstance(record[name], int) or isinstance(record[name], bool) or record[name] < 0:
                raise _broken(path, f"count {name} from 0 in every line", f"line {number}: {shown(record[name])}")
        for name in fields:
            value = record[name]
            if not is_finite(value):
                raise _broken(path, f"have a finite number as {name} in every line", f"line {number}: {shown(value)}")
        place = Place(record["layer"], record["head"])
        if place in found:
            raise _broken(path, "name every head once", f"layer {place.layer} head {place.head} again in line {number}")
        found[place] = {name: float(record[name]) for name in fields}
    return found


def _broken(path: Path, rule: str, got: str) -> StepFileError:
    return StepFileError(path, f"{rule}, got {got}", MEASURE_STEP, again=True)
