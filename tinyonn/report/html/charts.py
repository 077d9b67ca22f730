"""Charts as inline SVG: drawn once, readable without a script, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..scan.grid import Floats
from .palette import DASHES

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 40
# An axis is compressed where the largest value is this many times the usual one.
_SPREAD = 30.0
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Points:
    """One group of a scatter plot: (points,) values, and what each point is called. `shape` is circle, square or triangle."""

    name: str
    x: Floats
    y: Floats
    labels: Sequence[str]
    shape: str


@dataclass(frozen=True)
class DotRow:
    """One line of `interval_dots`: a value with its interval, where there are such; single values beside it; the value of chance;
    whether the limit is for it."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    singles: Sequence[float] = ()
    chance: float | None = None
    judged: bool = True


def linear_width(values: Floats) -> float | None:
    """Where an axis of such values should turn from linear to logarithmic (arsinh); None where a linear one shows them well."""
    sizes = np.abs(values[np.isfinite(values)])
    usual, largest = (float(np.median(sizes)), float(sizes.max())) if len(sizes) else (0.0, 0.0)
    return usual if usual > 0 and largest > _SPREAD * usual else None


class _Axis:
    """Places of values between 0 and 1, with ticks; arsinh where a few values are far beyond the others."""

    def __init__(self, values: Floats) -> None:
        self._width = linear_width(values)
        low, high = float(values.min()), float(values.max())
        room = 0.04 * (self._bent(high) - self._bent(low)) or abs(self._bent(high)) * 0.1 or 1.0
        self._low, self._high = self._bent(low) - room, self._bent(high) + room
        ticks = [low] if low == high else nice_ticks(low, high) if self._width is None else bent_ticks(low, high, self._width)
        self.ticks = [tick for tick in ticks if 0 <= self.place(tick) <= 1]
        exponent = 0 if self._width is not None else _shared_exponent(self.ticks)
        self.labels = [format_number(tick / 10.0**exponent) for tick in self.ticks]
        # What the axis title says of the numbers at the ticks.
        self.unit = " (arsinh scale)" if self._width is not None else f" (× 10{str(exponent).translate(_RAISED)})" if exponent else ""

    def _bent(self, value: float) -> float:
        return value if self._width is None else math.asinh(value / self._width)

    def place(self, value: float) -> float:
        return (self._bent(value) - self._low) / (self._high - self._low)


def scatter(
    title: str,
    groups: Sequence[Points],
    *,
    x_title: str,
    y_title: str,
    x_marks: Sequence[tuple[str, float]] = (),
    y_marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Points with one shape and colour per group, later groups on top, and dashed lines at the marks.

    Returns:
        An <svg> element with its legend, or a line of text where no group has a point.
    """
    x_all, y_all = (np.concatenate([getattr(group, axis) for group in groups] or [np.zeros(0)]) for axis in "xy")
    if not len(x_all):
        return '<p class="empty">No measured value.</p>'
    x_axis, y_axis = _Axis(x_all), _Axis(y_all)
    height = 360

    def x_of(value: float) -> float:
        return _LEFT + x_axis.place(value) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return height - _BOTTOM - y_axis.place(value) * (height - 18 - _BOTTOM)

    parts = [_frame(title, height)]
    parts += [_y_tick(y_of(tick), label) for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True)]
    parts += [
        f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="18" y2="{height - _BOTTOM}"/>'
        f'<text class="tick" x="{x_of(tick):.1f}" y="{height - 24}" text-anchor="middle">{label}</text>'
        for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True)
    ]
    for name, value in x_marks:
        x = x_of(value)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text class="tick label" x="{x:.1f}" y="12" text-anchor="middle">{escape(name)}</text>')
    for name, value in y_marks:
        y = y_of(value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick label" x="{_WIDTH - _RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for number, group in enumerate(groups):
        for x, y, label in zip(group.x.tolist(), group.y.tolist(), group.labels, strict=True):
            told = f"{label}: {format_number(x)}, {format_number(y)}"
            parts.append(_shape(group.shape, x_of(x), y_of(y), number, told))
    parts.append(_axis_titles(x_title + x_axis.unit, y_title + y_axis.unit, height))
    legend = "".join(
        f'<span><svg width="14" height="14" aria-hidden="true">{_shape(group.shape, 7, 7, number)}</svg>{escape(group.name)} '
        f"({len(group.x):,})</span>"
        for number, group in enumerate(groups)
    )
    return f'{"".join(parts)}</svg><div class="series">{legend}</div>'


def interval_dots(
    title: str, rows: Sequence[DotRow], *, low: float, high: float, x_title: str, limit: tuple[str, float] | None = None
) -> str:
    """One line per row on a scale from `low` to `high`: a dot with its interval, hollow dots for single values, a cross for chance.

    The limit, a name and a value, is a dashed line across the rows that it judges.
    """
    left, row_height = 124, 26
    height = len(rows) * row_height + 62
    bottom = height - 40

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (_WIDTH - left - 16)

    parts = [_frame(title, height)]
    for tick in nice_ticks(low, high, 4):
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="18" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x_of(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{format_number(tick)}</text>')
    if limit is not None:
        for number in (number for number, row in enumerate(rows) if row.judged):
            top = 18 + number * row_height
            parts.append(f'<line class="mark" x1="{x_of(limit[1]):.1f}" x2="{x_of(limit[1]):.1f}" y1="{top}" y2="{top + row_height}"/>')
        parts.append(f'<text class="tick label" x="{x_of(limit[1]):.1f}" y="12" text-anchor="middle">{escape(limit[0])}</text>')
    for number, row in enumerate(rows):
        y = 18 + (number + 0.5) * row_height
        parts.append(f'<text class="name" x="{left - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(row.name)}</text>')
        if row.chance is not None:
            cross = f"M{x_of(row.chance) - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
            parts.append(f'<path class="chance" d="{cross}"><title>by chance {format_number(row.chance)}</title></path>')
        parts += [f'<circle class="single" cx="{x_of(value):.1f}" cy="{y:.1f}" r="3.5"/>' for value in row.singles]
        if row.low is not None and row.high is not None:
            parts.append(f'<line class="whisker" x1="{x_of(row.low):.1f}" x2="{x_of(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if row.value is None:
            parts.append(f'<text class="tick" x="{x_of(low) + 6:.1f}" y="{y + 4:.1f}">not defined</text>')
        else:
            interval = "" if row.low is None or row.high is None else f", interval {row.low:.3g} to {row.high:.3g}"
            told = f"{row.name}: {row.value:.3g}{interval}"
            parts.append(f'<circle class="value" cx="{x_of(row.value):.1f}" cy="{y:.1f}" r="5"><title>{escape(told)}</title></circle>')
    parts.append(f'<text class="axis" x="{(left + _WIDTH - 16) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_title)}</text>')
    return f"{''.join(parts)}</svg>"


def line_chart(
    title: str,
    rows: Sequence[str],
    series: Sequence[tuple[str, Floats]],
    *,
    x_title: str,
    y_title: str,
    log: bool = False,
    zero: bool = False,
) -> str:
    """One line per series over the rows; NaN breaks a line.

    Args:
        title: for screen readers.
        rows: label of each x position.
        series: name and (rows,) values each.
        x_title, y_title: axis titles.
        log: logarithmic y axis; values ≤ 0 are left out.
        zero: draw the line y = 0.

    Returns:
        An <svg> element with its legend, or a line of text where nothing is finite.
    """
    stacked = np.array([values for _, values in series], dtype=np.float64).reshape(len(series), len(rows))
    usable = np.isfinite(stacked) & (stacked > 0 if log else True)
    if not usable.any():
        return '<p class="empty">No measured value.</p>'
    low, high = float(stacked[usable].min()), float(stacked[usable].max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    ticks = _log_ticks(low, high) if log else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def y_of(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    step = (_WIDTH - _LEFT - _RIGHT) / max(len(rows) - 1, 1)
    parts = [_frame(title), *(_y_tick(y_of(tick), format_number(tick)) for tick in ticks)]
    if zero and low < 0 < high:
        parts.append(f'<line class="zero" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(0):.1f}" y2="{y_of(0):.1f}"/>')
    every = max(1, math.ceil(len(rows) / 10))
    # Row labels are numbers, or a few long names that would overlap: those are shortened, the tooltip has them whole.
    for position in range(0, len(rows), every):
        place = f'x="{_LEFT + position * step:.1f}" y="{_HEIGHT - 24}" text-anchor="middle"'
        parts.append(f'<text class="tick" {place}>{escape(rows[position][-9:])}</text>')
    for number, (name, _) in enumerate(series):
        style = f'class="line" style="stroke:var(--s{number % len(DASHES)})" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        points = [
            (_LEFT + position * step, y_of(value)) if good else None
            for position, (value, good) in enumerate(zip(stacked[number], usable[number], strict=True))
        ]
        path = ""
        for position, point in enumerate(points):
            if point is not None:
                path += f"{'L' if position and points[position - 1] is not None else 'M'}{point[0]:.1f} {point[1]:.1f}"
        parts.append(f'<path {style} d="{path}"/>')
        for position, point in enumerate(points):
            if point is not None:
                label = f"{name}, {rows[position]}: {stacked[number, position]:.4g}"
                parts.append(
                    f'<circle class="dot" style="fill:var(--s{number % len(DASHES)})" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3">'
                    f"<title>{escape(label)}</title></circle>"
                )
    parts.append(_axis_titles(x_title, y_title))
    legend = "".join(
        f'<span><svg width="26" height="8" aria-hidden="true"><line class="line" x1="0" x2="26" y1="4" y2="4" '
        f'style="stroke:var(--s{number % len(DASHES)})" stroke-dasharray="{DASHES[number % len(DASHES)]}"/></svg>{escape(name)}</span>'
        for number, (name, _) in enumerate(series)
    )
    return f'{"".join(parts)}</svg><div class="series">{legend}</div>'


def histogram(title: str, values: Floats, *, x_title: str, y_title: str, marks: Sequence[tuple[str, float]] = (), bins: int = 40) -> str:
    """Counts of values in equal bins up to the 99.5th percentile, the last bin holding the rest; `marks` are labelled lines."""
    if not len(values):
        return '<p class="empty">No measured value.</p>'
    low = float(values.min())
    # Losses start at 0; means of sequences lie close together, far from it.
    low = min(low, 0.0) if low < 0.5 * float(values.max()) else low
    high = float(np.quantile(values, 0.995))
    high = high if high > low else low + 1.0
    counts, edges = np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))
    ticks = [tick for tick in nice_ticks(0.0, float(counts.max())) if tick == int(tick)]  # of counts
    top = max(ticks[-1], float(counts.max()))

    def x_of(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(count: float) -> float:
        return _HEIGHT - _BOTTOM - count / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_frame(title), *(_y_tick(y_of(tick), format_number(tick)) for tick in ticks)]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        more = " and more" if right == edges[-1] and values.max() > high else ""
        parts.append(
            f'<rect class="bar" x="{x_of(left) + 0.5:.1f}" y="{y_of(count):.1f}" width="{max(x_of(right) - x_of(left) - 1, 0.5):.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y_of(count):.1f}"><title>{left:.2f} to {right:.2f}{more}: {count:,}</title></rect>'
        )
    parts.extend(
        f'<text class="tick" x="{x_of(tick):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{format_number(tick)}</text>'
        for tick in nice_ticks(low, high)
        if low <= tick <= high
    )
    inside = [(label, value) for label, value in marks if low <= value <= high]
    parts.extend(f'<line class="mark" x1="{x_of(v):.1f}" x2="{x_of(v):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>' for _, v in inside)
    for number, (label, value) in enumerate(inside):
        right = x_of(value) < (_LEFT + _WIDTH) * 0.6  # room for the label on the right of its line
        place = f'x="{x_of(value) + (4 if right else -4):.1f}" y="{_TOP + 12 + 16 * number}" text-anchor="{"start" if right else "end"}"'
        parts.append(f'<text class="tick label" {place}>{escape(label)} {value:.2f}</text>')
    parts.append(_axis_titles(x_title, y_title))
    return f"{''.join(parts)}</svg>"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span low … high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def bent_ticks(low: float, high: float, width: float) -> list[float]:
    """0 and powers of ten on both sides of it, at most four a side and none so small that it lies on 0."""
    powers = range(math.ceil(math.log10(1.5 * width)), math.floor(math.log10(max(abs(low), abs(high)))) + 1)
    sizes = [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 4))]]
    return [tick for tick in (*(-size for size in reversed(sizes)), 0.0, *sizes) if low <= tick <= high]


def _shared_exponent(ticks: Sequence[float]) -> int:
    """Power of ten that all ticks are divided by where they would be long: a multiple of 3, else 0."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if 0 < largest < 0.1 or largest >= 1e5 else 0


def format_number(value: float) -> str:
    """A number as an axis shows it: no trailing zeros, powers of ten only where they are shorter."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [10.0**power for power in range(first, last + 1, every)]
    return ticks if ticks[-1] >= high * (1 - 1e-9) else [*ticks, 10.0 ** (first + every * len(ticks))]


def _shape(shape: str, x: float, y: float, number: int, told: str = "") -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    style = f'class="point" style="fill:var(--s{number % len(DASHES)})"'
    match shape:
        case "square":
            return f'<rect {style} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9">{title}</rect>'
        case "triangle":
            return f'<path {style} d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z">{title}</path>'
        case _:
            return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>'


def _frame(title: str, height: int = _HEIGHT) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'


def _y_tick(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _axis_titles(x_title: str, y_title: str, height: int = _HEIGHT) -> str:
    middle = (height - _BOTTOM + _TOP) / 2
    return (
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="axis" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )


def interval_bars(title: str, names: Sequence[str], values: Floats, low: Floats, high: Floats, *, x_title: str, muted: bool = False) -> str:
    """Horizontal bars with an interval each, the first on top; `muted` draws them grey: nothing to claim."""
    if not len(names):
        return '<p class="empty">No block to show.</p>'
    width, left, right, row = 1000, 330, 20, 22
    height = len(names) * row + 46
    edges = np.concatenate([low, high, values])
    edges = edges[np.isfinite(edges)]
    ticks = nice_ticks(min(0.0, float(edges.min(initial=0.0))), max(0.0, float(edges.max(initial=0.0))), 8)

    def x_of(value: float) -> float:
        inside = min(max(value, ticks[0]), ticks[-1])
        return left + (inside - ticks[0]) / (ticks[-1] - ticks[0]) * (width - left - right)

    parts = [f'<svg class="chart wide" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="4" y2="{height - 40}"/>')
        parts.append(f'<text class="tick" x="{x_of(tick):.1f}" y="{height - 25}" text-anchor="middle">{format_number(tick)}</text>')
    for number, (name, value, lower, upper) in enumerate(zip(names, values.tolist(), low.tolist(), high.tolist(), strict=True)):
        y = 6 + number * row
        kind = "muted" if muted else "more" if value > 0 else "less"
        first, last = sorted((x_of(0.0), x_of(value)))
        label = f"{name}: {value:.4g}, interval {lower:.4g} to {upper:.4g}"
        parts.append(
            f'<g><title>{escape(label)}</title><text class="name" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{kind}" x="{first:.1f}" y="{y + 2}" width="{max(last - first, 0.5):.1f}" height="{row - 8}"/>'
            f'<line class="whisker" x1="{x_of(lower):.1f}" x2="{x_of(upper):.1f}" y1="{y + 9}" y2="{y + 9}"/>'
            f'<line class="whisker" x1="{x_of(lower):.1f}" x2="{x_of(lower):.1f}" y1="{y + 5}" y2="{y + 13}"/>'
            f'<line class="whisker" x1="{x_of(upper):.1f}" x2="{x_of(upper):.1f}" y1="{y + 5}" y2="{y + 13}"/></g>'
        )
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_title)}</text>')
    return f"{''.join(parts)}</svg>"
