"""Errors a person can mend. The command line prints them as one line; a library user catches them by type."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable

__all__ = ["InputError", "MscanError"]  # what a user catches; the rest writes messages

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 12
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


LINE = 240  # characters of a message on the screen: three rows of a terminal
REASON = 160  # of these, what another library says


class InputError(ValueError):
    """A file, option or value that the caller gave is wrong; the message names it and what would be right."""


class MissingPackageError(RuntimeError):
    """An optional package is not installed; the message is from `needs`."""


def needs(what: str, *packages: str) -> str:
    """The message on missing packages, with a command that works everywhere: "a figure needs matplotlib: pip install matplotlib"."""
    return f"{what} needs {' and '.join(packages)}: pip install {' '.join(packages)}"


def did_you_mean(value: object, choices: Iterable[object], most: int = 1) -> str:
    """How a message on a wrong choice ends: "; did you mean 'python'?", or "." where no choice is near.

    Args:
        most: near ones named.
    """
    if not isinstance(value, str):
        return "."
    known = {str(choice).casefold(): str(choice) for choice in choices}
    near = difflib.get_close_matches(value.casefold(), known, n=most)
    return f"; did you mean {' or '.join(repr(known[name]) for name in near)}?" if near else "."


def shown(value: object, most: int = 60) -> str:
    """A value as Python writes it, for a message: `most` characters at most, and never more of it written out than about that."""
    try:
        text = repr(value[: most + 1]) if isinstance(value, str) else _SHORT.repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def listed(names: Iterable[object], most: int = 6, *, width: int = 40, room: int = 120, none: str = "none") -> str:
    """Names for a message: "a, b, c and 9 more".

    Args:
        names: of files, fields, options, classes.
        most: named; the rest is counted.
        width: characters of a name; a longer one is cut.
        room: characters of all names; fewer than `most` are named where they take more.
        none: text where there are no names.
    """
    every = [_cut(" ".join(str(name).split()), width) for name in names]
    most = min(most, len(every))
    while most > 1 and len(", ".join(every[:most])) > room:
        most -= 1
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more or none


def reason(error: object, most: int = REASON) -> str:
    """The words of another library in one line: as many whole sentences as fit, else whole words of the first.

    Args:
        error: an exception, or its text.
        most: characters.
    """
    text = " ".join(str(error).split())
    if len(text) <= most:
        return text
    whole = [found.end() for found in re.finditer(r"[.!?](?= )", text) if found.end() <= most]
    return text[: whole[-1]] if whole else _cut(text, most)


def one_line(text: str, most: int = LINE) -> str:
    """A message in one line that fits on a screen.

    A line that is too long loses the folders before long paths; if that is not enough, words from its middle. The beginning names what
    is wrong, and the end names the remedy.

    Args:
        text: the message.
        most: characters.
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    line = " ".join(path_tail(word) for word in line.split(" "))
    if len(line) <= most:
        return line
    end = most // 3
    first, last = line[: most - end - 5], line[-end:]
    begin = first.rpartition(" ")[0] if " " in first[len(first) // 2 :] else first
    rest = last.partition(" ")[2] if " " in last[: end // 2] else last
    return f"{begin} ... {rest}"


def path_tail(word: str, most: int = 60) -> str:
    """A long path by its last parts, ".../scores/out"; other words as they are."""
    if len(word) <= most or "/" not in word[1:]:
        return word
    parts = word[-most + 2 :].partition("/")[2]
    return f".../{parts or word[-most + 4 :]}"


def _cut(text: str, most: int) -> str:
    """The first words of a text; a word that is longer alone is cut."""
    if len(text) <= most:
        return text
    first = text[: most - 3]
    if " " not in first[len(first) // 2 :]:
        return f"{first.rstrip()}..."
    return f"{text[: most - 4].rpartition(' ')[0].rstrip(',;:')} ..."


class MscanError(ValueError):
    """A .mscan file breaks a rule of the format.

    Args:
        path: the file.
        rule: the broken rule and the value found.
        offset: byte position of the failure, if it has one.
    """

    def __init__(self, path: str | os.PathLike[str], rule: str, offset: int | None = None) -> None:
        self.path = os.fspath(path)
        self.rule = rule
        self.offset = offset
        where = self.path if offset is None else f"{self.path}, byte {offset}"
        super().__init__(f"{where}: {rule}")
