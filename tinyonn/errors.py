"""Errors a person can mend. The command line prints them as one line; a library user catches them by type."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 12
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class InputError(ValueError):
    """A file, option or value that the caller gave is wrong; the message names it and what would be right."""


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


class MscanError(ValueError):
    """A .mscan file breaks a rule of the format.

    Args:
        path: the file.
        rule: what must hold and what was found.
        offset: byte position of the failure, if it has one.
    """

    def __init__(self, path: str | os.PathLike[str], rule: str, offset: int | None = None) -> None:
        self.path = os.fspath(path)
        self.rule = rule
        self.offset = offset
        where = self.path if offset is None else f"{self.path}, byte {offset}"
        super().__init__(f"{where}: {rule}")
