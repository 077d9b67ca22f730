"""Errors a person can mend. The command line prints them as one line; a library user catches them by type."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class InputError(ValueError):
    """A file, option or value that the caller gave is wrong; the message names it and what would be right."""


def did_you_mean(value: object, choices: Iterable[object], most: int = 1) -> str:
    """How a message on a wrong choice ends: "; did you mean 'python'?", or "." where no choice is near.

    Args:
        most: near ones named.
    """
    known = {str(choice).casefold(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(value).casefold(), known, n=most)
    return f"; did you mean {' or '.join(repr(known[name]) for name in near)}?" if near else "."


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
