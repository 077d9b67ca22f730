"""Page over all seeds of a plasticity run: means with intervals, recurring cases, maps of the means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._io.files import write_atomically
from ..._io.units import counted
from ...errors import InputError
from ...heads.step_files import read_json, read_record
from ...heads.study import AGGREGATE, AGGREGATE_TABLE, PAGE, REPORT_STEP, TRAIN_AGAIN, TRAIN_STEP, TRAINED
from ..html.charts import DotRow
from ..html.maps import make_map
from ..html.page import facts, group, notices, section, table, table_card, terms
from ..scan.report import ReportResult
from .files import HeadColumns, read_heads
from .plasticity_limits import (
    MeasuredRows,
    if_unrelated,
    is_judged,
    judged_line,
    limits_of_numbers,
    limits_of_rows,
    pair_name,
    read_rows,
)
from .plasticity_parts import (
    KEYS,
    MAPS,
    MEANINGS,
    cases_section,
    column_map,
    column_maps_section,
    decimals,
    figure_cells,
    found_number,
    statistics_section,
)
from .shell import head_page, model_title

_SHOWN_CASES = 40


def write_plasticity_aggregate(folder: str | os.PathLike[str]) -> ReportResult:
    """Writes index.html from aggregate.json and aggregate.csv of OUTPUT/TASK.

    Raises:
        InputError: a file is missing or not as the report step writes it; the message names it.
    """
    root = Path(folder)
    found = read_json(root / AGGREGATE, dict, REPORT_STEP)
    heads = read_heads(root / AGGREGATE_TABLE, [f"{name}_{what}" for name in MAPS for what in ("mean", "sd")], REPORT_STEP)
    try:
        rows = {seed["folder"]: read_rows(root / seed["folder"]) for seed in found["seeds"]}
        options = read_record(root / found["seeds"][0]["folder"] / TRAINED, {"options": "an object"}, TRAIN_STEP, TRAIN_AGAIN)["options"]
        content = _page(found, heads, rows, model_title(found["model"], options.get("model_path")))
    except (KeyError, TypeError) as error:
        raise InputError(f"{root / AGGREGATE} must be as the report step writes it, got {error!r}; run {REPORT_STEP}.") from error
    write_atomically(root / PAGE, content)
    return ReportResult(root / PAGE, ())


def _page(found: Mapping[str, Any], heads: HeadColumns, rows: Mapping[str, MeasuredRows], model: str) -> str:
    seeds = found["seeds"]
    maps = [column_map(heads, key, f"{key}_mean", ", mean") for key in MAPS]
    if len(seeds) > 1:
        for key in ("I_pre", "Urel"):
            title, unit, _, _ = MAPS[key]
            legend = "Standard deviation of the head's value over seeds."
            maps.append(make_map(f"{key}_sd", f"{title}, spread", legend, unit, heads.grid(f"{key}_sd"), signed=False))
    left_out = [f"{seed['folder']} is left out: {seed['found']}; run {seed['step']}." for seed in found["incomplete"]]
    body = [
        notices([*limits_of_rows(rows), *limits_of_numbers(found), *found["notes"], *left_out]),
        section("runs", "Runs", facts(_facts(found, rows))),
        _statistics(found),
        _acceptance(found),
        column_maps_section(maps, "the means and spreads of aggregate.csv."),
        _cases(found),
        section("terms", "Terms", terms(MEANINGS)),
    ]
    number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return head_page(f"What training on {found['task']} does to heads", [model, number], body, heads, maps)


def _facts(found: Mapping[str, Any], rows: Mapping[str, MeasuredRows]) -> dict[str, object]:
    interval = found["interval"]
    return {
        "model": found["model"],
        "task": found["task"],
        "seeds": ", ".join(str(seed["seed"]) for seed in found["seeds"]),
        "layers": found["counts"]["layers"],
        "heads": found["counts"]["heads"],
        "highest heads compared": found["pairs"][0]["overlap"]["k"],
        "percentiles of cases": f"{found['high']:g} and {found['low']:g}",
        "accuracy after training, by seed": ", ".join(str(decimals(its.accuracy)) for its in rows.values()),
        "commonest class measured": ", ".join(dict.fromkeys(its.told for its in rows.values())),
        "intervals": f"{interval['confidence']:.0%}, {interval['method']}",
    }


def _dots(pair: Mapping[str, Any], what: str, judged: bool, chance: float | None = None) -> DotRow:
    numbers = pair[what]
    known = [value for value in numbers["values"] if value is not None]
    singles = known if len(known) > 1 else []
    return DotRow(pair_name(pair), numbers["mean"], numbers["low"], numbers["high"], singles, chance, judged)


def _statistics(found: Mapping[str, Any]) -> str:
    pairs = found["pairs"]
    judged = [is_judged(pair, found["acceptance"]) for pair in pairs]
    rhos = [_dots(pair, "rho", its) for pair, its in zip(pairs, judged, strict=True)]
    overlaps = [_dots(pair, "overlap", its, pair["overlap"]["chance"]) for pair, its in zip(pairs, judged, strict=True)]
    legend = "A filled dot is the mean over seeds, a line its interval, a hollow dot one seed."
    rows = []
    for pair in [*pairs, *found["taylor"]]:
        rho, overlap = pair["rho"], pair["overlap"]
        numbers = [part[name] for part in (rho, overlap) for name in ("mean", "sd", "low", "high")]
        rows.append([pair_name(pair), rho["n"], *map(decimals, numbers), decimals(overlap["chance"])])
    head = ["columns", "seeds", "ρ", "sd", "from", "to", "overlap", "sd", "from", "to", "by chance"]
    return statistics_section(
        rhos, overlaps, found["acceptance"], (legend, f"{legend} A cross is chance."), head, rows, ", means over seeds"
    )


def _acceptance(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["acceptance"]:
        values = ", ".join("–" if value is None else str(found_number(value)) for value in row["values"])
        figure, rule = figure_cells(row)
        rows.append([figure, rule, f"{row['met']} of {row['met'] + row['missed']}", values, if_unrelated(row["figure"], found)])
    listing = table(
        ["figure", "wanted", "seeds that meet it", "values by seed", "if unrelated"],
        rows,
        caption="The original study's figures",
        wrapped=(3,),
    )
    agreement = table_card(
        ["column", "ρ between seeds", "pairs of seeds"],
        [[row["column"], decimals(row["rho"]), row["pairs"]] for row in found["agreement"]],
        "Agreement between seeds: mean rank correlation over all pairs of seeds",
        numeric=(1, 2),
    )
    body = group("grid-tables", [f'<div class="card">{listing}</div>', agreement])
    return section("acceptance", "From seed to seed", body, lead=judged_line(found["pairs"], found["acceptance"]))


def _cases(found: Mapping[str, Any]) -> str:
    listed = {}
    total = len(found["seeds"])
    for kind, key in KEYS.items():
        all_cases = found["cases"][key]
        rows = [
            [case["layer"], case["head"], f"{case['seeds']} of {total}", case["I_pre_mean"], case["Urel_mean"]]
            for case in all_cases[:_SHOWN_CASES]
        ]
        listed[kind] = (
            rows,
            f"the first {_SHOWN_CASES} of {len(all_cases)}" if len(all_cases) > _SHOWN_CASES else counted(len(rows), "head"),
        )
    head = ["layer", "head", "seeds", "I_pre, mean", "Urel, mean"]
    return cases_section(
        head, listed, "No head is a case in any seed.", "Number of seeds in which a head is a case. aggregate.csv lists all heads."
    )
