"""Errors that a user can correct, as one line, and their exit codes."""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import dataclass

import typer

from ..errors import InputError, MissingPackageError, MscanError, did_you_mean, one_line

# Some versions of Typer contain a copy of click, others import click. The base classes have the same order in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

BAD_INPUT = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Ending:
    """One line for stderr, and an exit code."""

    line: str
    code: int


def explain(error: BaseException, command: str) -> Ending | None:
    """Line and exit code for an error; None for a bug. The line fits on a screen, however long the message is."""
    text = _message(error, command)
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else BAD_INPUT
    return None if text is None else Ending(one_line(f"{command}: {text}"), code)


def _message(error: BaseException, command: str) -> str | None:
    if isinstance(error, KeyboardInterrupt):
        return _joined(error) or _interrupted(command)
    if isinstance(error, UsageError):
        return f"{_usage(error)} See `{command} --help`."
    if isinstance(error, ClickException):
        return str(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, MscanError) and error.offset and command != "tinyonn recover" and _can_be_recovered(error.path):
        file = error.path if len(error.path) <= 60 else "FILE"
        return f"{_joined(error)} `tinyonn recover {file} -o PATH` keeps what can be read."
    if isinstance(error, (InputError, MscanError, MissingPackageError)):
        return _joined(error)
    if _ran_out_of_memory(error):
        return f"memory ran out. {_lower(command)}"
    if isinstance(error, OSError) and error.errno is not None:
        return _os_error(error, command)
    return None


def _can_be_recovered(path: str) -> bool:
    """Whether at least one sequence of a damaged file can be read."""
    from ..mscan import MscanReader

    try:
        with MscanReader(path, recovery="salvage") as reader:
            return len(reader) > 0
    except (MscanError, OSError):
        return False


def _interrupted(command: str) -> str:
    resumable = ("tinyonn heads demo", *(f"tinyonn heads plasticity {step}" for step in ("train", "measure", "run")))
    if command in resumable:
        return "interrupted; the same command, without --overwrite, continues from the saved state."
    if command in ("tinyonn train", "tinyonn train arc", "tinyonn eval arc"):
        return "interrupted; run the same command to go on from what is saved."
    return "interrupted."


def _usage(error: Exception) -> str:
    # str(error) would omit similar names.
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    # Typer uses pydantic to check values. Its messages name a Python exception, or omit the value.
    message = message.replace("Value error, ", "", 1)
    if details := getattr(error.__cause__, "errors", None):
        value = details()[0].get("input")
        message = re.sub(r"Input should be ([^,.]*).*", lambda found: f"{value!r} is not {found[1]}.", message)
    if choice := re.search(r"'([^']*)' is not one of (.*)\.$", message):
        choices = re.findall(r"'([^']*)'", choice[2])
        if len(own := (getattr(getattr(error, "param", None), "metavar", None) or "").split("|")) > 1:
            choices = own  # as in the help; Typer's own message lacks their underscores
        message = message.replace(choice[2], ", ".join(map(repr, choices)))[:-1] + did_you_mean(choice[1], choices)
    return message if message.endswith((".", "?")) else f"{message}."


def _joined(error: BaseException) -> str:
    return " ".join(str(error).split())


def _os_error(error: OSError, command: str) -> str:
    reason = os.strerror(error.errno or 0)
    if command == "tinyonn scan" and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += " (--store integral writes far less; --output-path may name another disk)"
    names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
    return f"{' -> '.join(str(name) for name in names)}: {reason}." if names else f"{reason}."


def _ran_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:  # not an error of torch; torch is not imported for this check
        return isinstance(error, MemoryError)
    from ..hf.memory import is_out_of_memory

    return is_out_of_memory(error)


def _lower(command: str) -> str:
    if command == "tinyonn scan":
        return "Lower --batch-size or --max-length, or use --dtype bf16 or --store integral; `--estimate` prints the memory needed."
    if command.startswith("tinyonn heads"):
        return "Lower --batch-size or --max-length, or use --dtype bf16."
    return "Use a smaller --limit, a smaller file or a larger machine."
