"""The page over all seeds of a plasticity run: means with intervals, heads that are cases again and again, maps of the means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._io.files import write_atomically
from ..._io.units import counted
from ...errors import InputError
from ...heads.study import AGGREGATE, AGGREGATE_TABLE, PAGE, REPORT_STEP, TRAIN_AGAIN, TRAIN_STEP, TRAINED, read_json, read_record
from ..html.charts import DotRow
from ..html.maps import make_map
from ..html.page import card, facts, map_card, map_data, notices, page, section, table, terms
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
from .plasticity_page import KEYS, MAPS, MEANINGS, STATISTICS_LEAD, decimals, dot_charts, found_number
from .scores_page import head_names, model_title, view_controls

_SHOWN_CASES = 40


def write_plasticity_aggregate(folder: str | os.PathLike[str]) -> ReportResult:
    """Draws aggregate.json and aggregate.csv of OUTPUT/TASK as index.html.

    Raises:
        InputError: a file is missing or not what the report step writes; the line names it.
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
    names, short = head_names(heads.num_heads)
    maps = [
        make_map(key, f"{title}, mean", legend, unit, heads.grid(f"{key}_mean"), signed=signed)
        for key, (title, unit, signed, legend) in MAPS.items()
    ]
    if len(seeds) > 1:
        for key in ("I_pre", "Urel"):
            title, unit, _, _ = MAPS[key]
            legend = "Standard deviation over seeds: how far another run moves the head's value."
            maps.append(make_map(f"{key}_sd", f"{title}, spread", legend, unit, heads.grid(f"{key}_sd"), signed=False))
    left_out = [f"{seed['folder']} is left out: {seed['found']}; run {seed['step']}." for seed in found["incomplete"]]
    legend = (
        "By layer: each row is scaled by itself. Global: all rows share one scale. As measured: the means and spreads of aggregate.csv."
    )
    body = [
        notices([*limits_of_rows(rows), *limits_of_numbers(found), *found["notes"], *left_out]),
        section("runs", "Runs", facts(_facts(found, rows))),
        _statistics(found),
        _acceptance(found),
        section("maps", "Layers and heads", view_controls("none", legend) + f'<div class="grid2">{"".join(map(map_card, maps))}</div>'),
        _cases(found),
        section("terms", "Terms", terms(MEANINGS)),
    ]
    data = {"maps-data": [map_data(heat_map, heads.layers, names, short) for heat_map in maps]}
    number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    subtitle = f"{model}, {number}, {counted(len(heads.layers), 'layer')}, {counted(len(heads.places), 'head')}. Written by tinyonn."
    return page(f"What training on {found['task']} does to heads", subtitle, "\n".join(body), data, ["core.js", "map.js"])


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
    left, right = dot_charts(rhos, overlaps, found["acceptance"])
    legend = "A full dot is the mean over seeds, a line its interval, a hollow dot one seed."
    cards = card("Rank correlation", left, legend=legend) + card("Overlap of the highest", right, legend=f"{legend} A cross is chance.")
    rows = []
    for pair in [*pairs, *found["taylor"]]:
        rho, overlap = pair["rho"], pair["overlap"]
        numbers = [part[name] for part in (rho, overlap) for name in ("mean", "sd", "low", "high")]
        rows.append([pair_name(pair), rho["n"], *map(decimals, numbers), decimals(overlap["chance"])])
    head = ["columns", "seeds", "ρ", "sd", "from", "to", "overlap", "sd", "from", "to", "by chance"]
    listing = table(head, rows, caption="Rank correlations and overlaps, means over seeds", numeric=range(1, 11))
    body = f'<div class="grid3">{cards}</div><div class="card below">{listing}</div>'
    return section("statistics", "Importance and change", body, lead=STATISTICS_LEAD)


def _acceptance(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["acceptance"]:
        values = ", ".join("–" if value is None else str(found_number(value)) for value in row["values"])
        rows.append(
            [
                row["figure"].replace("rho", "ρ"),
                row["rule"].replace(">=", "≥"),
                f"{row['met']} of {row['met'] + row['missed']}",
                values,
                if_unrelated(row["figure"], found),
            ]
        )
    listing = table(
        ["figure", "wanted", "seeds that meet it", "values by seed", "if unrelated"],
        rows,
        caption="The original study's figures",
        wrapped=(3,),
    )
    agreement = table(
        ["column", "ρ between seeds", "pairs of seeds"],
        [[row["column"], decimals(row["rho"]), row["pairs"]] for row in found["agreement"]],
        caption="Whether another seed finds the same heads: mean rank correlation between every two seeds",
        numeric=(1, 2),
    )
    body = f'<div class="grid-tables"><div class="card">{listing}</div><div class="card">{agreement}</div></div>'
    return section("acceptance", "From seed to seed", body, lead=judged_line(found["pairs"], found["acceptance"]))


def _cases(found: Mapping[str, Any]) -> str:
    cards = []
    total = len(found["seeds"])
    for kind, key in KEYS.items():
        all_cases = found["cases"][key]
        rows = [
            [case["layer"], case["head"], f"{case['seeds']} of {total}", case["I_pre_mean"], case["Urel_mean"]]
            for case in all_cases[:_SHOWN_CASES]
        ]
        more = f", the first {_SHOWN_CASES} of {len(all_cases)}" if len(all_cases) > _SHOWN_CASES else f", {counted(len(rows), 'head')}"
        listing = table(["layer", "head", "seeds", "I_pre, mean", "Urel, mean"], rows, caption=f"{kind}{more}", numeric=range(5))
        cards.append(f'<div class="card">{listing}</div>' if rows else card(kind, '<p class="empty">No head is one in any seed.</p>'))
    lead = "In how many seeds a head is a case; aggregate.csv has all heads."
    return section("cases", "Cases", f'<div class="grid2">{"".join(cards)}</div>', lead=lead)
