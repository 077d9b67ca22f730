"""Charts as inline SVG. They need no script, and the page's style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..scan.grid import Floats
from .palette import DASHES

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 40
# An axis is compressed if the largest value is this many times the median.
_SPREAD = 30.0
_EMPTY = '<p class="empty">No measured value.</p>'
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Points:
    """One group of a scatter plot: (points,) values and their labels. `shape` is circle, square or triangle."""

    name: str
    x: Floats
    y: Floats
    labels: Sequence[str]
    shape: str


@dataclass(frozen=True)
class DotRow:
    """One row of `interval_dots`.

    Attributes:
        name: label.
        value: value of the row; None if it is not defined.
        low, high: interval; None if it is not known.
        singles: single values behind `value`.
        chance: value that chance would give.
        judged: whether the limit applies to the row.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    singles: Sequence[float] = ()
    chance: float | None = None
    judged: bool = True


def linear_width(values: Floats) -> float | None:
    """Width of the linear part of an arsinh axis for these values; None if a linear axis shows them well."""
    sizes = np.abs(values[np.isfinite(values)])
    usual, largest = (float(np.median(sizes)), float(sizes.max())) if len(sizes) else (0.0, 0.0)
    return usual if usual > 0 and largest > _SPREAD * usual else None


class _Axis:
    """Axis from 0 to 1 with ticks; arsinh if a few values are far beyond the others."""

    def __init__(self, values: Floats) -> None:
        self._width = linear_width(values)
        low, high = float(values.min()), float(values.max())
        room = 0.04 * (self._bent(high) - self._bent(low)) or abs(self._bent(high)) * 0.1 or 1.0
        self._low, self._high = self._bent(low) - room, self._bent(high) + room
        ticks = [low] if low == high else nice_ticks(low, high) if self._width is None else bent_ticks(low, high, self._width)
        self.ticks = [tick for tick in ticks if 0 <= self.place(tick) <= 1]
        exponent = 0 if self._width is not None else _shared_exponent(self.ticks)
        self.labels = [format_number(tick / 10.0**exponent) for tick in self.ticks]
        # End of the axis title: the scale or the power of ten of the tick labels.
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
        An <svg> element with its legend, or a line of text if no group has a point.
    """
    x_all, y_all = (np.concatenate([getattr(group, axis) for group in groups] or [np.zeros(0)]) for axis in "xy")
    if not len(x_all):
        return _EMPTY
    x_axis, y_axis = _Axis(x_all), _Axis(y_all)
    height = 360

    def x_of(value: float) -> float:
        return _LEFT + x_axis.place(value) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return height - _BOTTOM - y_axis.place(value) * (height - 18 - _BOTTOM)

    parts = [_frame(title, height)]
    parts += [_y_tick(y_of(tick), label) for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True)]
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        parts += [_down("grid", x_of(tick), 18, height - _BOTTOM), _label("tick", x_of(tick), height - 24, label)]
    for name, value in x_marks:
        parts += [_down("mark", x_of(value), 18, height - _BOTTOM), _label("tick label", x_of(value), 12, name)]
    for name, value in y_marks:
        parts += [_across("mark", y_of(value)), _label("tick label", _WIDTH - _RIGHT - 2, y_of(value) - 4, name, "end")]
    for number, group in enumerate(groups):
        for x, y, label in zip(group.x.tolist(), group.y.tolist(), group.labels, strict=True):
            told = f"{label}: {format_number(x)}, {format_number(y)}"
            parts.append(_shape(group.shape, x_of(x), y_of(y), number, told))
    parts.append(_axis_titles(x_title + x_axis.unit, y_title + y_axis.unit, height))
    legend = [(_shape_sign(group.shape, number), f"{group.name} ({len(group.x):,})") for number, group in enumerate(groups)]
    return _finished(parts, legend)


def interval_dots(
    title: str, rows: Sequence[DotRow], *, low: float, high: float, x_title: str, limit: tuple[str, float] | None = None
) -> str:
    """One line per row on a scale from `low` to `high`: a dot with its interval, hollow dots for single values, a cross for chance.

    The limit, a name and a value, is a dashed line across the rows that are judged.
    """
    left, row_height = 124, 26
    height = len(rows) * row_height + 62
    bottom = height - 40

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (_WIDTH - left - 16)

    parts = [_frame(title, height)]
    for tick in nice_ticks(low, high, 4):
        parts += _x_tick(x_of(tick), tick, 18, bottom)
    if limit is not None:
        for number in (number for number, row in enumerate(rows) if row.judged):
            top = 18 + number * row_height
            parts.append(_down("mark", x_of(limit[1]), top, top + row_height))
        parts.append(_label("tick label", x_of(limit[1]), 12, limit[0]))
    for number, row in enumerate(rows):
        y = 18 + (number + 0.5) * row_height
        parts.append(_label("name", left - 14, y + 4, row.name, "end"))
        if row.chance is not None:
            cross = f"M{x_of(row.chance) - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
            parts.append(f'<path class="chance" d="{cross}"><title>by chance {format_number(row.chance)}</title></path>')
        parts += [f'<circle class="single" cx="{x_of(value):.1f}" cy="{y:.1f}" r="3.5"/>' for value in row.singles]
        if row.low is not None and row.high is not None:
            parts.append(_across("whisker", y, x_of(row.low), x_of(row.high)))
        if row.value is None:
            parts.append(_label("tick", x_of(low) + 6, y + 4, "not defined", "start"))
        else:
            interval = "" if row.low is None or row.high is None else f", interval {row.low:.3g} to {row.high:.3g}"
            told = f"{row.name}: {row.value:.3g}{interval}"
            parts.append(f'<circle class="value" cx="{x_of(row.value):.1f}" cy="{y:.1f}" r="5"><title>{escape(told)}</title></circle>')
    parts.append(_label("axis", (left + _WIDTH - 16) // 2, height - 6, x_title))
    return _finished(parts)


def interval_bars(title: str, names: Sequence[str], values: Floats, low: Floats, high: Floats, *, x_title: str, muted: bool = False) -> str:
    """Horizontal bars with an interval each, the first on top; `muted` draws them grey, for differences without significance."""
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

    parts = [_frame(title, height, width)]
    for tick in ticks:
        parts += _x_tick(x_of(tick), tick, 4, height - 40)
    for number, (name, value, lower, upper) in enumerate(zip(names, values.tolist(), low.tolist(), high.tolist(), strict=True)):
        y = 6 + number * row
        kind = "muted" if muted else "more" if value > 0 else "less"
        first, last = sorted((x_of(0.0), x_of(value)))
        label = f"{name}: {value:.4g}, interval {lower:.4g} to {upper:.4g}"
        parts += [
            f"<g><title>{escape(label)}</title>",
            _label("name", left - 8, y + 13, name, "end"),
            f'<rect class="{kind}" x="{first:.1f}" y="{y + 2}" width="{max(last - first, 0.5):.1f}" height="{row - 8}"/>',
            _across("whisker", y + 9, x_of(lower), x_of(upper)),
            *(_down("whisker", x_of(end), y + 5, y + 13) for end in (lower, upper)),
            "</g>",
        ]
    parts.append(_label("axis", (left + width - right) // 2, height - 6, x_title))
    return _finished(parts)


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
        title: title for screen readers.
        rows: label of each x position.
        series: name and (rows,) values of each line.
        x_title, y_title: axis titles.
        log: whether the y axis is logarithmic; values ≤ 0 are then left out.
        zero: whether to draw the line y = 0.

    Returns:
        An <svg> element with its legend, or a line of text if no value is finite.
    """
    stacked = np.array([values for _, values in series], dtype=np.float64).reshape(len(series), len(rows))
    usable = np.isfinite(stacked) & (stacked > 0 if log else True)
    if not usable.any():
        return _EMPTY
    ticks, y_of = _y_axis(stacked[usable], log, zero)
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(rows) - 1, 1)
    parts = [_frame(title), *(_y_tick(y_of(tick), format_number(tick)) for tick in ticks)]
    if zero and ticks[0] < 0 < ticks[-1]:
        parts.append(_across("zero", y_of(0)))
    every = max(1, math.ceil(len(rows) / 10))
    # Long row labels would overlap, so they are cut; the tooltips show them whole.
    parts += [_label("tick", _LEFT + at * step, _HEIGHT - 24, rows[at][-9:]) for at in range(0, len(rows), every)]
    legend = []
    for number, (name, _) in enumerate(series):
        places = np.flatnonzero(usable[number]).tolist()
        points = [(_LEFT + at * step, y_of(stacked[number, at]), f"{name}, {rows[at]}: {stacked[number, at]:.4g}") for at in places]
        joined = [at - 1 == before for before, at in zip([-2, *places], places, strict=False)]
        parts += _curve(number, points, joined)
        legend.append((_line_sign(number), name))
    parts.append(_axis_titles(x_title, y_title))
    return _finished(parts, legend)


@dataclass(frozen=True)
class Band:
    """One row of `bands`.

    Attributes:
        name: label.
        spans: begin, end and description of each part of the row.
        marks: kind, place and description of each mark.
    """

    name: str
    spans: Sequence[tuple[float, float, str]]
    marks: Sequence[tuple[str, float, str]] = ()


def step_chart(
    title: str,
    lines: Sequence[tuple[str, Floats, Floats]],
    *,
    y_title: str,
    log: bool = False,
    dots: bool = False,
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Lines over steps, each with steps of its own; values that are not finite are left out.

    Args:
        title: title for screen readers.
        lines: name, steps in rising order and values of each line.
        y_title: title of the y axis.
        log: whether the y axis is logarithmic; values ≤ 0 are then left out.
        dots: whether to draw a dot for each value in place of a line.
        marks: label and step of upright lines; those beside the values are left out.

    Returns:
        An <svg> element with its legend, or a line of text if no value is finite.
    """
    drawn = []
    for number, (name, steps, values) in enumerate(lines):
        usable = np.isfinite(values) & (values > 0 if log else True)
        if usable.any():
            drawn.append((number, name, steps[usable].tolist(), values[usable].tolist()))
    if not drawn:
        return _EMPTY
    ticks, y_of = _y_axis(np.concatenate([values for *_, values in drawn]), log)
    ends = [step for _, _, steps, _ in drawn for step in (steps[0], steps[-1])]
    x_ticks, x_of = _step_axis(min(ends), max(ends), _LEFT, _WIDTH - _RIGHT)
    parts = [_frame(title), *(_y_tick(y_of(tick), format_number(tick)) for tick in ticks)]
    parts += [_label("tick", x_of(tick), _HEIGHT - 24, label) for tick, label in x_ticks]
    parts += _upright([(label, x_of(step)) for label, step in marks if min(ends) <= step <= max(ends)])
    for number, name, steps, values in drawn:
        points = [(x_of(step), y_of(value), f"{name}, step {step:,.0f}: {value:.4g}") for step, value in zip(steps, values, strict=True)]
        if dots:
            parts += [_shape("circle", x, y, number, told) for x, y, told in points]
        else:
            parts += _curve(number, points, [False, *[True] * (len(points) - 1)])
    parts.append(_axis_titles("step", y_title))
    return _finished(parts, [(_shape_sign("circle", number) if dots else _line_sign(number), name) for number, name, _, _ in drawn])


def bands(title: str, rows: Sequence[Band], kinds: Sequence[tuple[str, str, int]]) -> str:
    """One row for each band, over steps: its spans as bars in turns of two shades, and marks at steps.

    Args:
        title: title for screen readers.
        rows: the bands.
        kinds: name and shape of each kind of mark, and whether it is above (-1), on (0) or below (1) the bar.

    Returns:
        An <svg> element with its legend, or a line of text if there is no span and no mark.
    """
    edges = [edge for row in rows for begin, end, _ in row.spans for edge in (begin, end)]
    edges += [place for row in rows for _, place, _ in row.marks]
    if not edges:
        return _EMPTY
    width, left, right, row_height = 1000, 160, 24, 56
    height = len(rows) * row_height + 46
    ticks, x_of = _step_axis(min(edges), max(edges), left, width - right)
    parts = [_frame(title, height, width)]
    for tick, label in ticks:
        parts += [_down("grid", x_of(tick), 4, height - 40), _label("tick", x_of(tick), height - 25, label)]
    used = set()
    for number, row in enumerate(rows):
        middle = 6 + (number + 0.5) * row_height
        name = row.name if len(row.name) <= 24 else row.name[:23] + "…"
        parts.append(_label("name", left - 12, middle + 4, name, "end"))
        for place, (begin, end, told) in enumerate(row.spans):
            size = f'x="{x_of(begin):.1f}" y="{middle - 9:.1f}" width="{max(x_of(end) - x_of(begin), 1.0):.1f}" height="18"'
            parts.append(f'<rect class="{("bar", "bar soft")[place % 2]}" {size}><title>{escape(told)}</title></rect>')
        for kind, step, told in row.marks:
            at = next(at for at, (known, _, _) in enumerate(kinds) if known == kind)
            used.add(at)
            parts.append(_shape(kinds[at][1], x_of(step), middle + 18 * kinds[at][2], at + 1, told))
    parts.append(_label("axis", (left + width - right) // 2, height - 6, "step"))
    legend = [(_shape_sign(shape, at + 1), name) for at, (name, shape, _) in enumerate(kinds) if at in used]
    return _finished(parts, legend)


def histogram(title: str, values: Floats, *, x_title: str, y_title: str, marks: Sequence[tuple[str, float]] = (), bins: int = 40) -> str:
    """Counts of values in equal bins up to the 99.5th percentile; the last bin also holds the rest. `marks` are labelled lines."""
    if not len(values):
        return _EMPTY
    low = float(values.min())
    # Losses of tokens start at 0; means of sequences lie close together, far from 0.
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
    parts += [_label("tick", x_of(tick), _HEIGHT - 24, format_number(tick)) for tick in nice_ticks(low, high) if low <= tick <= high]
    inside = [(label, value) for label, value in marks if low <= value <= high]
    parts += _upright([(f"{label} {value:.2f}", x_of(value)) for label, value in inside])
    parts.append(_axis_titles(x_title, y_title))
    return _finished(parts)


def _upright(marks: Sequence[tuple[str, float]]) -> list[str]:
    """Upright lines at places of the x axis, and their labels one below the other."""
    parts = [_down("mark", x, _TOP, _HEIGHT - _BOTTOM) for _, x in marks]
    for number, (label, x) in enumerate(marks):
        right = x < (_LEFT + _WIDTH) * 0.6  # room for the label on the right of its line
        side, anchor = (4, "start") if right else (-4, "end")
        parts.append(_label("tick label", x + side, _TOP + 12 + 16 * number, label, anchor))
    return parts


def _y_axis(values: Floats, log: bool, zero: bool = False) -> tuple[list[float], Callable[[float], float]]:
    """Ticks that span the values, and the height of a value in a chart."""
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high and not log:  # room on both sides of a line that does not change
        low, high = low - abs(low) / 10, high + abs(high) / 10
    ticks = _log_ticks(low, high) if log else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def y_of(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    return ticks, y_of


def _step_axis(low: float, high: float, left: float, right: float) -> tuple[list[tuple[float, str]], Callable[[float], float]]:
    """Whole steps with their labels, and the place of a step between `left` and `right`."""

    def x_of(step: float) -> float:
        return left + (step - low) / max(high - low, 1.0) * (right - left)

    ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high and tick == int(tick)]
    return [(tick, format_number(tick)) for tick in ticks if low < high] or [(low, format_number(low))], x_of


def _curve(number: int, points: Sequence[tuple[float, float, str]], joined: Sequence[bool]) -> list[str]:
    """A line with tooltips. A point that no line reaches is drawn; the pointer shows the others.

    Args:
        number: of the line, which gives its colour and dashes.
        points: place and description of each point.
        joined: whether a point is joined with the one before.
    """
    colour = number % len(DASHES)
    path = "".join(f"{'L' if join else 'M'}{x:.1f} {y:.1f}" for (x, y, _), join in zip(points, joined, strict=True))
    alone = [not before and not after for before, after in zip(joined, [*joined, False][1:], strict=True)]
    dots = [
        f'<circle class="{"dot seen" if seen else "dot"}" style="fill:var(--s{colour})" cx="{x:.1f}" cy="{y:.1f}" r="3">'
        f"<title>{escape(told)}</title></circle>"
        for (x, y, told), seen in zip(points, alone, strict=True)
    ]
    return [f'<path class="line" {_stroke(number)} d="{path}"/>', *dots]


def _stroke(number: int) -> str:
    colour = number % len(DASHES)
    return f'style="stroke:var(--s{colour})" stroke-dasharray="{DASHES[colour]}"'


def _line_sign(number: int) -> str:
    """The sign of a line in a legend."""
    return f'<svg width="26" height="8" aria-hidden="true"><line class="line" x1="0" x2="26" y1="4" y2="4" {_stroke(number)}/></svg>'


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
    """0 and powers of ten on both sides, at most four per side and none so small that it overlaps 0."""
    powers = range(math.ceil(math.log10(1.5 * width)), math.floor(math.log10(max(abs(low), abs(high)))) + 1)
    sizes = [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 4))]]
    return [tick for tick in (*(-size for size in reversed(sizes)), 0.0, *sizes) if low <= tick <= high]


def _shared_exponent(ticks: Sequence[float]) -> int:
    """Power of ten, a multiple of 3, to divide long tick labels by; 0 for short ones."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if 0 < largest < 0.1 or largest >= 1e5 else 0


def format_number(value: float) -> str:
    """A number for an axis: no trailing zeros, powers of ten only if they are shorter."""
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
        case "diamond":
            return f'<path {style} d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5 -5.5 5.5 -5.5 -5.5z">{title}</path>'
        case _:
            return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3.2">{title}</circle>'


def _shape_sign(shape: str, number: int) -> str:
    """The sign of points in a legend."""
    return f'<svg width="14" height="14" aria-hidden="true">{_shape(shape, 7, 7, number)}</svg>'


def _frame(title: str, height: int = _HEIGHT, width: int = _WIDTH) -> str:
    kind = "chart" if width == _WIDTH else "chart wide"
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _place(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _across(kind: str, y: float, left: float = _LEFT, right: float = _WIDTH - _RIGHT) -> str:
    """A horizontal line."""
    return f'<line class="{kind}" x1="{_place(left)}" x2="{_place(right)}" y1="{_place(y)}" y2="{_place(y)}"/>'


def _down(kind: str, x: float, top: float, bottom: float) -> str:
    """A vertical line."""
    return f'<line class="{kind}" x1="{_place(x)}" x2="{_place(x)}" y1="{_place(top)}" y2="{_place(bottom)}"/>'


def _label(kind: str, x: float, y: float, label: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{_place(x)}" y="{_place(y)}" text-anchor="{anchor}">{escape(label)}</text>'


def _x_tick(x: float, value: float, top: int, bottom: int) -> list[str]:
    return [_down("zero" if value == 0 else "grid", x, top, bottom), _label("tick", x, bottom + 15, format_number(value))]


def _y_tick(y: float, label: str) -> str:
    return _across("grid", y) + _label("tick", _LEFT - 6, y + 4, label, "end")


def _axis_titles(x_title: str, y_title: str, height: int = _HEIGHT) -> str:
    middle = (height - _BOTTOM + _TOP) / 2
    turned = f'<text class="axis" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    return _label("axis", (_LEFT + _WIDTH - _RIGHT) // 2, height - 6, x_title) + turned


def _finished(parts: Sequence[str], legend: Sequence[tuple[str, str]] = ()) -> str:
    """The whole chart, with a legend of signs and names."""
    names = "".join(f"<span>{sign}{escape(name)}</span>" for sign, name in legend)
    return "".join(parts) + "</svg>" + (f'<div class="series">{names}</div>' if legend else "")
