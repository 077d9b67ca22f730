"""Frame of a page: one HTML file that contains its style, script and data, safe for any text in a data set.

Hand-written canvas code (assets/, 37 kB with the style) draws the maps. Plotly's script alone would add 4.8 MB to each page, for
a few hundred coloured cells, a text and some points. A Content-Security-Policy forbids every request, so a page works offline.

Two rules make hostile text harmless. Text in markup is escaped by `text`. Data is in an inert JSON element without `<`, `>` or
`&`, and the script inserts strings as text nodes only.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from ..._io.units import counted
from .maps import NORMALISATIONS, HeatMap, Normalisation
from .palette import page_palette, series_css

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
# Control characters that HTML forbids or that reorder text, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_BY_LAYER = "each row is scaled by itself, so every layer shows its pattern."


def printable(value: object) -> str:
    """Any value as text for a chart, which escapes it: characters that HTML forbids or that reorder text are replaced."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def text(value: object) -> str:
    """Any value as escaped HTML text, also for quoted attributes."""
    return html.escape(printable(value), quote=True)


def json_element(name: str, value: object) -> str:
    """A <script type="application/json"> element that no string in `value` can close; NaN and infinities become null."""
    body = json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    body = body.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{text(name)}">{body}</script>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", numeric: Sequence[int] = (), wrapped: Sequence[int] = ()
) -> str:
    """A table; numeric columns are right-aligned, wrapped columns may take several lines. Floats have four significant digits."""
    kinds = {**dict.fromkeys(numeric, " class=num"), **dict.fromkeys(wrapped, " class=wrap")}
    cells = "".join(
        "<tr>" + "".join(f"<td{kinds.get(column, '')}>{_cell(value)}</td>" for column, value in enumerate(row)) + "</tr>" for row in rows
    )
    titles = "".join(f'<th scope="col"{kinds.get(column, "")}>{text(title)}</th>' for column, title in enumerate(head))
    label = f"<caption>{text(caption)}</caption>" if caption else ""
    whole = f"<table>{label}<thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption or "table")}">{whole}</div>'


def facts(values: Mapping[str, object]) -> str:
    """A list of names and values."""
    entries = "".join(f"<div><dt>{text(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="facts">{entries}</dl>'


def terms(meanings: Mapping[str, str]) -> str:
    """Definitions of the terms in a table or list, to be placed below it; empty without terms."""
    entries = "".join(f"<div><dt>{text(word)}:</dt> <dd>{text(meaning)}</dd></div>" for word, meaning in meanings.items())
    return f'<dl class="legend terms">{entries}</dl>' if meanings else ""


def section(anchor: str, title: str, body: str, *, lead: str = "") -> str:
    """A titled part of the page."""
    intro = f'<p class="lead">{text(lead)}</p>' if lead else ""
    name = text(anchor)
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{text(title)}</h2>{intro}{body}</section>'


def group(kind: str, cards: Iterable[str]) -> str:
    """Cards in rows; `kind` is "grid2", "grid3" or "grid-tables"."""
    return f'<div class="{kind}">{"".join(cards)}</div>'


def table_card(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str,
    *,
    numeric: Sequence[int] = (),
    wrapped: Sequence[int] = (),
    of: str = "",
) -> str:
    """A framed `table`; the caption ends in the number of rows if `of` names what a row is."""
    caption += f", {counted(len(rows), of)}" if of else ""
    return f'<div class="card">{table(head, rows, caption=caption, numeric=numeric, wrapped=wrapped)}</div>'


def card(title: str, body: str, *, legend: str = "") -> str:
    """A framed part of a section; `body` is ready HTML."""
    under = f'<p class="legend">{text(legend)}</p>' if legend else ""
    return f'<div class="card"><h3>{text(title)}</h3>{under}{body}</div>'


def map_card(heat_map: HeatMap) -> str:
    """Card of a heat map, which the page's script draws."""
    return card(heat_map.title, f'<figure data-map="{text(heat_map.key)}"></figure>', legend=heat_map.legend)


def maps_section(title: str, maps: Iterable[HeatMap], *, controls: str = "", below: str = "", lead: str = "") -> str:
    """Heat maps, two per row, with `controls` above them and other HTML below."""
    return section("maps", title, controls + group("grid2", map(map_card, maps)) + below, lead=lead)


def view_controls(chosen: Normalisation, measured: str, *, by_layer: str = _BY_LAYER) -> str:
    """Radio buttons for the normalisation of every map, with a legend.

    Args:
        chosen: normalisation that the page shows first.
        measured: sentences on the values without normalisation.
        by_layer: sentence on the normalisation by layer.
    """
    names: dict[Normalisation, str] = {"layer": "by layer", "global": "global", "none": "as measured"}
    buttons = "".join(
        f'<label><input type="radio" name="normalise" value="{how}"{" checked" if how == chosen else ""}> {names[how]}</label>'
        for how in NORMALISATIONS
    )
    meanings = {"By layer": by_layer, "Global": "all rows share one scale, so layers compare.", "As measured": measured}
    legend = " ".join(f"<b>{name}</b>: {text(meaning)}" for name, meaning in meanings.items())
    return f'<div class="controls"><fieldset><legend>Normalisation</legend>{buttons}</fieldset></div><p class="legend">{legend}</p>'


def notices(lines: Sequence[str]) -> str:
    """Notes for the reader, above the numbers."""
    return '<ul class="notices">' + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def page(title: str, subtitle: str, body: Iterable[str], data: Mapping[str, object], *files: str) -> str:
    """The whole document.

    Args:
        title, subtitle: headings as plain text.
        body: HTML of the sections.
        data: values of the JSON elements by id.
        files: further names under assets/: styles (.css), and scripts to run after core.js and map.js.
    """
    elements = "".join(json_element(name, value) for name, value in {"palette-data": page_palette(), **data}.items())
    sections = "\n".join(body)
    styles = [name for name in files if name.endswith(".css")]
    scripts = [name for name in files if name not in styles]
    code = "".join(f"<script>\n{_asset(name)}</script>" for name in ("core.js", "map.js", *scripts))
    style = "".join(map(_asset, ("page.css", *styles)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{series_css()}\n{style}</style></head>\n"
        f"<body><header><h1>{text(title)}</h1><p>{text(subtitle)} Written by tinyonn.</p></header>\n<main>{sections}</main>\n"
        "<noscript><p>The maps and the replay need JavaScript. Tables and charts do not.</p></noscript>\n"
        f"{elements}\n{code}</body></html>\n"
    )


def maps_data(maps: Iterable[HeatMap], layers: Sequence[str], modules: Sequence[str], short: Sequence[str]) -> list[dict[str, Any]]:
    """Heat maps over the same layers and modules, for the page's script."""
    places = {"rows": list(layers), "columns": list(modules), "short": list(short), "rowTitle": "layer"}
    return [
        {"key": heat_map.key, "title": heat_map.title, **places, "unit": heat_map.unit, "values": heat_map.values}
        | {"views": {how: {"values": values, **vars(scale)} for how, (values, scale) in heat_map.views.items()}}
        for heat_map in maps
    ]


def short_digest(value: str) -> str:
    """First digits of a digest (32 or more hexadecimal digits); empty for any other text."""
    return f"{value[:12]}…" if len(value) >= 32 and set(value) <= set("0123456789abcdef") else ""


def _asset(name: str) -> str:
    return resources.files("tinyonn.report").joinpath("assets", name).read_text(encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, (float, np.floating)):
        value = float(value)
        return "–" if not math.isfinite(value) else text(f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}")
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return text(f"{value:,}")
    return text("–" if value is None else value)


def _plain(value: object) -> Any:
    """Arrays and numpy scalars as lists and numbers with six significant digits; None for NaN and infinities."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
