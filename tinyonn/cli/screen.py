"""Output of the commands: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from .._io.units import counted as counted
from .._io.units import duration as duration

PLAIN_EVERY = 10.0  # seconds between lines if stderr is no terminal
BAR_WIDTHS = (6, 12, 24)  # for narrow, usual and wide terminals

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(line: str) -> None:
    """Prints a note on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text without control characters, which names of files and models may contain."""
    return _CONTROLS.sub("\ufffd", text)


def rows(lines: Iterable[tuple[str, object]]) -> str:
    """Names and values in two columns; all lines of a value stay in its column."""
    entries = [(name, printable(str(value))) for name, value in lines]
    width = max((len(name) for name, _ in entries), default=0)
    gap = "\n" + " " * (width + 2)
    return "\n".join(f"{name:{width}}  {value.replace(chr(10), gap)}".rstrip() for name, value in entries)


def columns(head: Sequence[str], lines: Iterable[Sequence[object]], right: Sequence[int] | None = None) -> str:
    """A plain table. Columns numbered in `right` (None: all but the first) are aligned to the right."""
    table = [[str(value) for value in line] for line in (head, *lines)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    right = range(1, len(head)) if right is None else right
    padded = ([f"{cell:>{widths[at]}}" if at in right else f"{cell:<{widths[at]}}" for at, cell in enumerate(line)] for line in table)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def number(count: float) -> str:
    """A count with separators: 12,345."""
    return f"{count:,.0f}"


class Progress:
    """A context manager that shows progress: a bar if stderr is a terminal, else a plain line every 10 seconds.

    Both show the remaining time, from the second update on: progress of an earlier run has no speed.

    Args:
        label: name of the current stage, at the left of the line.
        enabled: False draws nothing (the other ranks of a scan).
    """

    def __init__(self, label: str, *, enabled: bool = True) -> None:
        self._label = label
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._started = self._said = time.monotonic()  # start of the stage, time of the last plain line
        self._first: tuple[float, float] | None = None  # time and value of the first known fraction

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            console = Console(stderr=True)
            if not console.is_dumb_terminal:
                # One line at any width: `_fitting` shortens the words, and narrow terminals have a short bar.
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
                self.update(None, "")
                self._bar.start()
        return self

    def update(self, fraction: float | None, text: str, *, label: str | None = None) -> None:
        """Shows the fraction done (None: unknown) and a few words."""
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
        """Label and text, cut to the width beside the other columns. Otherwise, rich would narrow all columns, even the spinner."""
        from rich.cells import cell_len, set_cell_size

        def cut(words: str, room: int) -> str:
            return words if cell_len(words) <= room else set_cell_size(words, max(room - 1, 0)) + "…"

        width = self._bar.console.width
        label = cut(label, width // 3)
        gaps = 5
        return label, cut(text, width - 1 - cell_len(label) - self._bar.columns[2].bar_width - len("10:00:00 left") - gaps)

    def _rest(self, fraction: float | None) -> str:
        """Remaining time, such as "12 s left"; empty if unknown."""
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
