"""Parts shared by the pages of one seed and of all seeds: columns and their meanings, maps, statistics, cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..html import charts
from ..html.charts import DotRow
from ..html.maps import HeatMap, make_map
from ..html.page import card, group, maps_section, section, table, table_card, view_controls
from .files import HeadColumns

STATIC, PLASTIC = "important-but-static", "plastic-but-unimportant"
KEYS = {STATIC: "important_but_static", PLASTIC: "plastic_but_unimportant"}
MEANINGS = {
    "I_pre, I_post": "importance before and after training: increase of the loss on the measured rows (nats) when the head's output is set "
    "to 0. Below 0, the model is better without the head.",
    "U": "update: Frobenius norm of the change of the head's query, key, value and output weights by training.",
    "Urel": "update relative to the norms of these weights before training.",
    "G_pre": "gradient before training: norm of the gradient of the loss with respect to the head's weights.",
    "taylor, taylor_abs": "first-order estimates of I from one backward pass: −mean of dL/dgate, and the mean over samples of |dL/dgate|.",
    STATIC: "among the most important heads before training, and among the least changed by it.",
    PLASTIC: "among the most changed heads, and among the least important before training.",
}
STATISTICS_LEAD = (
    "Relation between importance before training (I_pre) and change by training (U, Urel) or gradient (G_pre). "
    "Rows with taylor compare the first-order estimates with the exact importance. Terms, at the end, defines these names."
)
MAPS = {
    "I_pre": ("Importance before training", "loss increase, nats", True, "Loss increase without the head, before training."),
    "I_post": ("Importance after training", "loss increase, nats", True, "Loss increase without the head, after training."),
    "Urel": ("Relative update", "share of the weights' norm", False, "Change of the head's weights by training, relative to their norm."),
    "G_pre": (
        "Gradient before training",
        "norm, nats per unit of weight",
        False,
        "L2 norm of the gradient of the loss with respect to the head's weights.",
    ),
}


def column_map(heads: HeadColumns, key: str, column: str = "", more: str = "") -> HeatMap:
    """The map of a column of MAPS.

    Args:
        heads: table with the column.
        key: name of the column in MAPS.
        column: name in the table, if different.
        more: end of the title.
    """
    title, unit, signed, legend = MAPS[key]
    return make_map(key, title + more, legend, unit, heads.grid(column or key), signed=signed)


def column_maps_section(maps: Sequence[HeatMap], measured: str) -> str:
    """Section of the maps of columns, first as measured; `measured` describes these values."""
    return maps_section("Layers and heads", maps, controls=view_controls("none", measured))


def statistics_section(
    rhos: Sequence[DotRow],
    overlaps: Sequence[DotRow],
    stats: Mapping[str, Any],
    legends: tuple[str, str],
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    more: str = "",
) -> str:
    """Rank correlations and overlaps of the pairs, with the expected limits, above a table.

    Args:
        rhos, overlaps: rows of the two charts.
        stats: contents of stats.json or aggregate.json.
        legends: legends of the two charts.
        head, rows: the table; all columns are numbers but the first and "note".
        more: end of the table's caption.
    """
    max_rho, max_overlap = study_limits(stats)
    limits = [(f"expected: below {limit:g}", limit) for limit in (max_rho, max_overlap)]
    left = charts.interval_dots("Rank correlations", rhos, low=-1, high=1, x_title="Spearman's ρ", limit=limits[0])
    right = charts.interval_dots("Overlaps", overlaps, low=0, high=1, x_title="share of the highest heads in both", limit=limits[1])
    cards = [card("Rank correlation", left, legend=legends[0]), card("Overlap of the highest", right, legend=legends[1])]
    numeric = [column for column, title in enumerate(head) if column and title != "note"]
    listing = table(head, rows, caption=f"Rank correlations and overlaps{more}", numeric=numeric)
    body = f'{group("grid3", cards)}<div class="card below">{listing}</div>'
    return section("statistics", "Importance and change", body, lead=STATISTICS_LEAD)


def cases_section(head: Sequence[str], listed: Mapping[str, tuple[Sequence[Sequence[object]], str]], none: str, lead: str) -> str:
    """One table of heads per kind of case.

    Args:
        head: names of the columns, all of numbers.
        listed: rows and end of the caption of each kind.
        none: sentence for a kind without heads.
        lead: sentences below the title of the section.
    """
    cards = [
        table_card(head, rows, f"{kind}, {more}", numeric=range(len(head))) if rows else card(kind, f'<p class="empty">{none}</p>')
        for kind, (rows, more) in listed.items()
    ]
    return section("cases", "Cases", group("grid2", cards), lead=lead)


def figure_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """Name and rule of one of the expectations."""
    return row["figure"].replace("rho", "ρ"), row["rule"].replace(">=", "≥")


def found_number(value: float | None) -> object:
    """Value of an acceptance figure: a count unchanged, others with three decimals."""
    return decimals(value) if isinstance(value, float) else value


def decimals(value: float | None) -> str | None:
    """A correlation or a share with three decimals."""
    return None if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no minus before zero


def pair_name(pair: Mapping[str, Any]) -> str:
    """Name of a pair of columns on charts."""
    return f"{pair['x']}, {pair['y']}"


def study_limits(stats: Mapping[str, Any]) -> tuple[float, float]:
    """The expected limits of rank correlation and overlap."""
    limits = {row["figure"].partition("(")[0]: row["limit"] for row in stats["acceptance"]}
    return limits["rho"], limits["overlap"]


def is_judged(pair: Mapping[str, Any], stats: Mapping[str, Any]) -> bool:
    """Whether there are expectations for a pair of columns."""
    return any(row["figure"] == f"rho({pair_name(pair)})" for row in stats["acceptance"])


def judged_line(stats: Mapping[str, Any]) -> str:
    """Sentence on the pairs of columns that the expectations judge, and those that they do not."""
    judged, others = ([f"({pair_name(pair)})" for pair in stats["pairs"] if is_judged(pair, stats) is wanted] for wanted in (True, False))
    verb = "is" if len(others) == 1 else "are"
    rest = f"; {' and '.join(others)} {verb} shown but not judged" if others else ""
    return f"The expectations judge {' and '.join(judged)}, and the numbers of cases{rest}."


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
