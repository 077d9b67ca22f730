"""Errors a person can mend. The command line prints them as one line; a library user catches them by type."""

from __future__ import annotations

import os


class InputError(ValueError):
    """A file, option or value that the caller gave is wrong; the message names it and what would be right."""


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
