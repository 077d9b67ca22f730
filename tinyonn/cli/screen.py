"""What the commands put on the screen: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from .._io.units import counted as counted

PLAIN_EVERY = 10.0  # seconds between lines where no bar can be drawn
BAR_WIDTHS = (6, 12, 24)  # on narrow, usual and wide terminals

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(line: str = "") -> None:
    """A note on stderr: not part of the result."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without what would move the cursor or colour the screen: names of files and models come from anywhere."""
    return _CONTROLS.sub("\ufffd", text)


def rows(lines: Iterable[tuple[str, object]], indent: int = 0) -> str:
    """Names and values in two columns; a value of several lines keeps to its column."""
    entries = [(name, printable(str(value))) for name, value in lines]
    width = max((len(name) for name, _ in entries), default=0)
    gap = "\n" + " " * (indent + width + 2)
    return "\n".join(f"{'':{indent}}{name:{width}}  {value.replace(chr(10), gap)}".rstrip() for name, value in entries)


def columns(head: Sequence[str], lines: Iterable[Sequence[object]], right: Sequence[int] | None = None) -> str:
    """A plain table; the columns numbered in `right` (None: all but the first) stand to the right, as numbers should."""
    table = [[str(value) for value in line] for line in (head, *lines)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    right = range(1, len(head)) if right is None else right
    padded = ([f"{cell:>{widths[at]}}" if at in right else f"{cell:<{widths[at]}}" for at, cell in enumerate(line)] for line in table)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def number(count: float) -> str:
    """A count with separators: 12,345."""
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3:05, 2:01:07."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A bar on stderr where that is a terminal; elsewhere a plain line now and then. A context manager.

    Either says how long the rest will take, from the second look at the share done on: what an earlier run did tells no speed.

    Args:
        label: what is going on, for the left of the line.
        enabled: False draws nothing (the other ranks of a scan).
    """

    def __init__(self, label: str, *, enabled: bool = True) -> None:
        self._label = label
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._started = self._said = time.monotonic()  # the stage that `label` names, and the last plain line
        self._first: tuple[float, float] | None = None  # when a share was first known, and which

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            console = Console(stderr=True)
            if not console.is_dumb_terminal:
                # One line at any width: the words give way (`_fitting`), and the bar is short where there is little room.
                def words(field: str) -> TextColumn:
                    return TextColumn(field, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))

                width = BAR_WIDTHS[(console.width >= 80) + (console.width >= 100)]
                parts = (
                    words("{task.description}"),
                    BarColumn(bar_width=width),
                    words("{task.fields[text]}"),
                    words("{task.fields[rest]}"),
                )
                self._bar = Bar(SpinnerColumn(), *parts, console=console, transient=True)
                self._task = self._bar.add_task(self._label, total=None, text="", rest="")
                self._bar.start()
        return self

    def update(self, fraction: float | None, text: str, *, label: str | None = None) -> None:
        """Shows the share done (None: unknown) and a few words."""
        if label is not None and label != self._label:
            self._label, self._first, self._started = label, None, time.monotonic()
        rest = self._rest(fraction)
        if self._bar is not None:
            total = None if fraction is None else 1.0
            name, text = self._fitting(self._label, text)
            self._bar.update(self._task, description=name, total=total, completed=fraction or 0.0, text=text, rest=rest)
        elif self._enabled and time.monotonic() - self._said >= PLAIN_EVERY:
            self._said = time.monotonic()
            share = "" if fraction is None else f" {100 * fraction:.0f} %,"
            say(f"{self._label}:{share} {text}, {duration(self._said - self._started)}" + (rest and f", {rest}"))

    def _fitting(self, label: str, text: str) -> tuple[str, str]:
        """Both cut to the room beside the spinner, the bar and the rest. Left alone, rich takes from each column, the spinner too."""
        from rich.cells import cell_len, set_cell_size

        def cut(words: str, room: int) -> str:
            return words if cell_len(words) <= room else set_cell_size(words, max(room - 1, 0)) + "…"

        width = self._bar.console.width
        label = cut(label, width // 3)
        gaps = 5
        return label, cut(text, width - 1 - cell_len(label) - self._bar.columns[2].bar_width - len("10:00:00 left") - gaps)

    def _rest(self, fraction: float | None) -> str:
        """12 s left; nothing while it cannot be told."""
        if not fraction:
            return ""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, fraction)
        since, before = self._first
        return f"{duration((now - since) * (1 - fraction) / (fraction - before))} left" if fraction > before and now > since else ""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
