"""Commands that a demo runs."""

from __future__ import annotations

import shlex

import typer

from .. import screen


def run_command(*arguments: object) -> None:
    """Prints a command of tinyonn and runs it in this process."""
    from ..app import run

    command = [str(argument) for argument in arguments]
    screen.say(f"$ {shlex.join(['tinyonn', *command])}")
    code = run(command)
    if code:
        raise typer.Exit(code)
