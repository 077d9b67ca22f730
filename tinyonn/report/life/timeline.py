"""The timeline of lives: losses, integrity and population over all of a life's steps, its stretches, and why each ended."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..._io.files import write_atomically
from ..._io.units import counted, duration, readable_bytes
from ...errors import listed
from ..html.charts import Band, bands, step_chart
from ..html.page import card, facts, group, notices, page, printable, section, short_digest, table_card, terms
from ..scan.grid import Floats
from .data import MOST_POINTS, means

MOST_ROWS = 300  # of the table of stretches, and marks of a life in the chart of stretches
RUNNING = "running, or killed"

# Events that a running training writes. Between them and the next stretch a life may be forked, restored or compacted.
_RUN = frozenset({"stretch", "metrics", "evaluation", "birth", "recycling", "save", "stop"})
_KINDS = (("killed", "square", 0), ("stopped", "circle", 0), ("restored to", "triangle", -1), ("forked", "diamond", 1))
# Title and y title of each chart, and its measures: event, field (None for the number of events up to a step) and name.
CORE: tuple[tuple[str, str, tuple[tuple[str, str | None, str], ...]], ...] = (
    ("Loss", "nats a token", (("metrics", "loss", "training loss"), ("evaluation", "eval_loss", "held-out loss"))),
    ("Predictive integrity", "PI", (("metrics", "pi", "predictive integrity"),)),
    ("Live experts", "with heads, all layers", (("metrics", "live_experts", "live experts"),)),
    ("Births and recyclings", "up to a step", (("birth", None, "births"), ("recycling", None, "recyclings"))),
)
MEANINGS = {
    "stretch": "a run of training, from its start to its end",
    "killed": "the stretch wrote no reason for its end, as after a crash or a power cut",
    "restored": "a run went on from a kept step, or `tinyonn life restore` went back to one; metrics of later steps are not shown",
    "forked": "another life began from this step",
    "changed": "options of a fork that differ from those of its parent",
    "lasted": "the time between the records of the stretch; where the clock went back, nothing is added",
}


@dataclass(frozen=True)
class LifeLine:
    """A life, for its timeline.

    Attributes:
        name: name on the page.
        life: identity.
        parent: `life` and `step` of the life that it was forked from; None if it began new.
        records: records of its log that still hold, in order.
        kept_steps: steps that can be restored.
        stored_bytes: size of its store; None if not known.
        notes: sentences for the reader.
    """

    name: str
    life: str
    parent: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]]
    kept_steps: Sequence[int] = ()
    stored_bytes: int | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Stretch:
    """A run: its first record, the last step and seconds that its records show, and why it ended."""

    record: Mapping[str, Any]
    begin: int
    end: int
    seconds: float
    ended: str
    killed: bool


class _Life:
    """What the page shows of a life.

    Attributes:
        line: the life.
        name: its name, printable.
        records: records with a step.
        steps: the step that it has reached.
        stretches: its runs in order.
    """

    def __init__(self, line: LifeLine) -> None:
        self.line = line
        self.name = printable(line.name)
        self.records = [record for record in line.records if _is_whole(record.get("step"))]
        reached = [record["step"] for record in self.records if record.get("event") in _RUN or record.get("event") in ("begin", "restore")]
        self.steps: int | None = reached[-1] if reached else None
        self.stretches = _stretches(self.records)

    def of(self, event: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record.get("event") == event]

    def measured(self, event: str, field: str | None) -> tuple[Floats, Floats]:
        """Steps and values of a field, at most `MOST_POINTS`; without a field, how many events there were up to a step."""
        if field is None:
            return self._total(event)
        found = [(record["step"], _number(record.get(field))) for record in self.of(event)]
        known = np.array(sorted((step, value) for step, value in found if math.isfinite(value)), dtype=np.float64).reshape(-1, 2)
        return means(known[:, 0]), means(known[:, 1])

    def last(self, event: str, field: str) -> float | None:
        found = (_number(record.get(field)) for record in reversed(self.of(event)))
        return next((value for value in found if math.isfinite(value)), None)

    def _total(self, event: str) -> tuple[Floats, Floats]:
        if not self.records:
            return np.zeros(0), np.zeros(0)
        every = [record["step"] for record in self.records]
        last = max(every) if self.steps is None else self.steps  # a restored life has records of later steps
        steps = np.unique(np.linspace(min(every), last, MOST_POINTS).round())
        happened = sorted(record["step"] for record in self.of(event))
        return steps, np.searchsorted(happened, steps, side="right").astype(np.float64)


def write_timeline_page(path: str | os.PathLike[str], lives: Sequence[LifeLine]) -> Path:
    """Writes one page about one life, or about several that share its charts, such as a fork and its parent.

    Args:
        path: the page.
        lives: the lives.

    Returns:
        The page.

    Raises:
        InputError: the page cannot be written.
    """
    found = [_Life(line) for line in lives]
    several = len(found) > 1
    body = [
        notices([f"{one.name}: {note}" if several else note for one in found for note in one.line.notes]),
        section("now", "Now", group("grid2", [card(one.name, facts(_now(one, found))) for one in found])),
    ]
    if several:
        body.append(section("family", "Family", _family(found)))
    body.append(section("core", "Core metrics", group("grid3", _charts(found))))
    lead = "Runs of training over the steps of the life, in turns of two shades. Marks show where a run ended and what else was done."
    body.append(section("stretches", "Stretches and stops", _history(found, several), lead=lead))
    target = Path(path)
    title = f"Timeline of {found[0].name}" if len(found) == 1 else f"Timeline of {len(found)} lives"
    steps = max((one.steps for one in found if one.steps is not None), default=None)
    reached = "No step yet." if steps is None else f"{'Up to ' * several}{counted(steps, 'step')}."
    write_atomically(target, page(title, reached, body, {}))
    return target


def _now(one: _Life, lives: Sequence[_Life]) -> dict[str, object]:
    ended = [stretch for stretch in one.stretches if stretch.ended != RUNNING]
    killed = sum(stretch.killed for stretch in ended)
    kept = f"{len(one.line.kept_steps):,}"
    if one.line.kept_steps:
        kept += f": {listed((f'{step:,}' for step in one.line.kept_steps), 6)}"
    parent, forked = _parent(one, lives)
    return {
        "identity": one.line.life,
        "parent": parent,
        "forked at step": forked,
        "steps": one.steps,
        "loss": one.last("metrics", "loss"),
        "held-out loss": one.last("evaluation", "eval_loss"),
        "PI": one.last("metrics", "pi"),
        "live experts": _whole(one.last("metrics", "live_experts")),
        "births": len(one.of("birth")),
        "recyclings": len(one.of("recycling")),
        "stretches": len(one.stretches),
        "stops": len(ended) - killed,
        "killed": killed,
        "restored": len(one.of("restore")),
        "kept steps": kept,
        "stored": None if one.line.stored_bytes is None else readable_bytes(one.line.stored_bytes),
    }


def _parent(one: _Life, lives: Sequence[_Life]) -> tuple[object, object]:
    """Name of the parent, or its identity if it is not on the page, and the step of the fork; None without a parent."""
    parent = one.line.parent
    if parent is None:
        return None, None
    return next((other.name for other in lives if other.line.life == parent.get("life")), parent.get("life")), parent.get("step")


def _family(lives: Sequence[_Life]) -> str:
    rows = [
        (one.name, one.line.life, *_parent(one, lives), one.steps, one.last("metrics", "loss"), one.last("evaluation", "eval_loss"))
        for one in lives
    ]
    head = ("life", "identity", "parent", "forked at step", "steps", "last loss", "last held-out loss")
    return table_card(head, rows, "Lives", numeric=(3, 4, 5, 6))


def _charts(lives: Sequence[_Life]) -> list[str]:
    """Charts of one life have all their measures; several lives have a chart for each measure, with a line for each life."""
    alone = len(lives) == 1
    charts = CORE if alone else [(one[2].capitalize(), y_title, (one,)) for _, y_title, measures in CORE for one in measures]
    departures = [(one.name, _parent(one, lives)[1]) for one in lives]
    marks = [] if alone else [(f"{name} departs", _number(step)) for name, step in departures if _is_whole(step)]
    drawn = []
    for title, y_title, measures in charts:
        lines = [(name if alone else one.name, *one.measured(event, field)) for event, field, name in measures for one in lives]
        drawn.append(card(title, step_chart(title, lines, y_title=y_title, marks=marks)))
    saves = [("a save" if alone else one.name, *one.measured("save", "bytes")) for one in lives]
    sizes = [size for _, _, values in saves for size in values.tolist() if size > 0]
    unit, name = _byte_unit(max(sizes, default=0.0))
    points = [(of, steps, values / unit) for of, steps, values in saves]
    log = bool(sizes) and max(sizes) > 30 * min(sizes)
    return [*drawn, card("Size of saves", step_chart("Size of saves", points, y_title=name, log=log, dots=True))]


def _history(lives: Sequence[_Life], several: bool) -> str:
    if not any(one.stretches for one in lives):
        return '<div class="card"><p class="empty">No stretch yet.</p></div>'
    chart = bands("Stretches and stops", [_band(one, lives) for one in lives], _KINDS)
    changed = any(stretch.record.get("changed") for one in lives for stretch in one.stretches)
    head = ("from step", "to step", "began (UTC)", "lasted", "data", "hash", "objective", "device", *["changed"] * changed, "ended by")
    rows: list[tuple[object, ...]] = []
    for one in lives:
        for stretch in one.stretches[::-1]:
            record = stretch.record
            row = (
                stretch.begin,
                stretch.end,
                _when(record),
                duration(stretch.seconds),
                record.get("data"),
                short_digest(str(record.get("data_hash", ""))) or record.get("data_hash"),
                record.get("objective"),
                record.get("device"),
                *[changed_options(record.get("changed"))] * changed,
                stretch.ended,
            )
            rows.append((one.name, *row) if several else row)
    shown = rows[:MOST_ROWS]
    caption = "Stretches, the last first"
    if len(shown) < len(rows):
        caption += f", {MOST_ROWS} of {len(rows):,}"
    first = int(several)
    table = table_card(
        ("life", *head) if several else head,
        shown,
        caption,
        numeric=(first, first + 1),
        wrapped=(first + 4, *range(first + 8, first + len(head))),
    )
    return group("grid-tables", [f'<div class="card">{chart}</div>', table]) + terms(MEANINGS)


def changed_options(value: object) -> str | None:
    """What a fork changed: names of options with the parent's value and its own."""
    if not isinstance(value, Mapping) or not value:
        return None
    pairs = [(name, pair) for name, pair in value.items() if isinstance(pair, Sequence) and len(pair) == 2]
    return ", ".join(f"{name} {before} → {now}" for name, (before, now) in pairs)


def _band(one: _Life, lives: Sequence[_Life]) -> Band:
    spans, marks = [], []
    for stretch in one.stretches[-MOST_ROWS:]:
        steps = f"{stretch.begin:,} to {stretch.end:,}"
        spans.append((float(stretch.begin), float(stretch.end), f"{one.name}, steps {steps}, {duration(stretch.seconds)}: {stretch.ended}"))
        if stretch.ended != RUNNING:
            kind = "killed" if stretch.killed else "stopped"
            marks.append((kind, float(stretch.end), f"{kind} at step {stretch.end:,}" + ("" if stretch.killed else f": {stretch.ended}")))
    restored = [record["step"] for record in one.of("restore")[-MOST_ROWS:]]
    marks += [("restored to", float(step), f"restored to {step:,}") for step in restored]
    forks = [(record["step"], _words(record.get("child"))) for record in one.of("fork")[-MOST_ROWS:]]
    known = {child for _, child in forks}
    for other in lives:  # a fork of a life whose training ran is not in the log of that life
        parent = other.line.parent or {}
        if parent.get("life") == one.line.life and other.line.life not in known and _is_whole(parent.get("step")):
            forks.append((parent["step"], other.name))
    marks += [("forked", float(step), f"forked at step {step:,}: {child}") for step, child in forks]
    return Band(one.name, spans, marks)


def _stretches(records: Sequence[Mapping[str, Any]]) -> list[_Stretch]:
    """The runs of a life, in order of their records."""
    begins = [place for place, record in enumerate(records) if record.get("event") == "stretch"]
    found = []
    for begin, after in zip(begins, [*begins[1:], len(records)], strict=False):
        run = [record for record in records[begin:after] if record.get("event") in _RUN]
        stop = next((record for record in run if record.get("event") == "stop"), None)
        times = [at for record in run if (at := _time(record)) is not None]
        seconds = sum(max(0.0, (later - earlier).total_seconds()) for earlier, later in itertools.pairwise(times))
        killed = stop is None and after < len(records)
        ended = _words(stop.get("reason")) if stop is not None else "killed" if killed else RUNNING
        end = max(record["step"] for record in run)
        found.append(_Stretch(run[0], run[0]["step"], end, seconds, ended, killed))
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _number(value: object) -> float:
    """A number; NaN for anything else."""
    return float(value) if isinstance(value, float) or _is_whole(value) else math.nan  # type: ignore[arg-type]


def _whole(value: float | None) -> int | float | None:
    return int(value) if value is not None and value.is_integer() else value


def _words(value: object) -> str:
    return "–" if value is None else printable(value)


def _time(record: Mapping[str, Any]) -> datetime | None:
    try:
        at = datetime.fromisoformat(record["time"])
    except (KeyError, TypeError, ValueError):
        return None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _when(record: Mapping[str, Any]) -> str | None:
    at = _time(record)
    return None if at is None else f"{at:%Y-%m-%d %H:%M:%S}"


def _byte_unit(most: float) -> tuple[float, str]:
    """A power of ten for a chart of sizes, and its name."""
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= size), (1.0, "bytes"))
