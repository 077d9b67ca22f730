"""Page over all seeds of a plasticity run: means with intervals, recurring cases, maps of the means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._io.files import write_atomically
from ..._io.units import counted
from ...errors import InputError
from ...heads import study
from ...heads.step_files import read_json, read_record
from ..html.charts import DotRow
from ..html.maps import make_map
from ..html.page import facts, group, notices, section, table_card, terms
from ..scan.report import ReportResult
from . import plasticity_parts as parts
from .files import HeadColumns, read_heads
from .plasticity_limits import MeasuredRows, limits_of_numbers, limits_of_rows, read_rows
from .shell import head_page, model_title

_SHOWN_CASES = 40


def write_plasticity_aggregate(folder: str | os.PathLike[str]) -> ReportResult:
    """Writes index.html from aggregate.json and aggregate.csv of OUTPUT/TASK.

    Raises:
        InputError: a file is missing or not as the report step writes it; the message names it.
    """
    root = Path(folder)
    found = read_json(root / study.AGGREGATE, dict, study.REPORT_STEP)
    columns = [f"{name}_{what}" for name in parts.MAPS for what in ("mean", "sd")]
    heads = read_heads(root / study.AGGREGATE_TABLE, columns, study.REPORT_STEP)
    try:
        rows = {seed["folder"]: read_rows(root / seed["folder"]) for seed in found["seeds"]}
        trained = root / found["seeds"][0]["folder"] / study.TRAINED
        options = read_record(trained, {"options": "an object"}, study.TRAIN_STEP, study.TRAIN_AGAIN)["options"]
        content = _page(found, heads, rows, model_title(found["model"], options.get("model_path")))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{root / study.AGGREGATE} must be as the report step writes it, got {error!r}; run {study.REPORT_STEP}."
        ) from error
    write_atomically(root / study.PAGE, content)
    return ReportResult(root / study.PAGE, ())


def _page(found: Mapping[str, Any], heads: HeadColumns, rows: Mapping[str, MeasuredRows], model: str) -> str:
    seeds = found["seeds"]
    maps = [parts.column_map(heads, key, f"{key}_mean", ", mean") for key in parts.MAPS]
    if len(seeds) > 1:
        for key in ("I_pre", "Urel"):
            title, unit, _, _ = parts.MAPS[key]
            legend = "Standard deviation of the head's value over seeds."
            maps.append(make_map(f"{key}_sd", f"{title}, spread", legend, unit, heads.grid(f"{key}_sd"), signed=False))
    left_out = [f"{seed['folder']} is left out: {seed['found']}; run {seed['step']}." for seed in found["incomplete"]]
    body = [
        notices([*limits_of_rows(rows), *limits_of_numbers(found), *found["notes"], *left_out]),
        section("runs", "Runs", facts(_facts(found, rows))),
        _statistics(found),
        _acceptance(found),
        parts.column_maps_section(maps, "the means and spreads of aggregate.csv."),
        _cases(found),
        section("terms", "Terms", terms(parts.MEANINGS)),
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
        "accuracy after training, by seed": ", ".join(str(parts.decimals(its.accuracy)) for its in rows.values()),
        "commonest class measured": ", ".join(dict.fromkeys(its.told for its in rows.values())),
        "intervals": f"{interval['confidence']:.0%}, {interval['method']}",
    }


def _dots(found: Mapping[str, Any], what: str) -> list[DotRow]:
    rows = []
    for pair in found["pairs"]:
        numbers = pair[what]
        known = [value for value in numbers["values"] if value is not None]
        singles = known if len(known) > 1 else []
        interval = numbers["mean"], numbers["low"], numbers["high"]
        rows.append(DotRow(parts.pair_name(pair), *interval, singles, numbers.get("chance"), parts.is_judged(pair, found)))
    return rows


def _statistics(found: Mapping[str, Any]) -> str:
    legend = "A filled dot is the mean over seeds, a line its interval, a hollow dot one seed."
    rows = []
    for pair in [*found["pairs"], *found["taylor"]]:
        rho, overlap = pair["rho"], pair["overlap"]
        numbers = [part[name] for part in (rho, overlap) for name in ("mean", "sd", "low", "high")]
        rows.append([parts.pair_name(pair), rho["n"], *map(parts.decimals, numbers), parts.decimals(overlap["chance"])])
    head = ["columns", "seeds", "ρ", "sd", "from", "to", "overlap", "sd", "from", "to", "by chance"]
    legends = legend, f"{legend} A cross is chance."
    return parts.statistics_section(_dots(found, "rho"), _dots(found, "overlap"), found, legends, head, rows, ", means over seeds")


def _acceptance(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["acceptance"]:
        values = ", ".join("–" if value is None else str(parts.found_number(value)) for value in row["values"])
        figure, rule = parts.figure_cells(row)
        rows.append([figure, rule, f"{row['met']} of {row['met'] + row['missed']}", values, parts.if_unrelated(row["figure"], found)])
    head = ["figure", "wanted", "seeds that meet it", "values by seed", "if unrelated"]
    listing = table_card(head, rows, "Expectations", wrapped=(3,))
    agreement = table_card(
        ["column", "ρ between seeds", "pairs of seeds"],
        [[row["column"], parts.decimals(row["rho"]), row["pairs"]] for row in found["agreement"]],
        "Agreement between seeds: mean rank correlation over all pairs of seeds",
        numeric=(1, 2),
    )
    body = group("grid-tables", [listing, agreement])
    return section("acceptance", "From seed to seed", body, lead=parts.judged_line(found))


def _cases(found: Mapping[str, Any]) -> str:
    listed = {}
    total = len(found["seeds"])
    for kind, key in parts.KEYS.items():
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
    return parts.cases_section(
        head, listed, "No head is a case in any seed.", "Number of seeds in which a head is a case. aggregate.csv lists all heads."
    )
