"""The command's commands, and how a run of it ends."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from .. import __version__
from .errors import explain
from .screen import say

# In the order of a piece of work, which is the order of `tinyonn --help`. Each module holds a function of its name, or a group of commands.
COMMANDS = ("demo", "doctor", "corpus", "scan", "report", "compare", "heads", "info", "verify", "recover", "convert")


def _normal(token: str) -> str:
    # The original workflow wrote --model_path; and --output is what one types.
    name = token.replace("_", "-")
    return "output-path" if name == "output" else name


app = typer.Typer(
    name="tinyonn",
    help="Scan a language model over a corpus, and look at what every block of every weight did.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": _normal,
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tinyonn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    pass


for _name in COMMANDS:
    _command = getattr(importlib.import_module(f".{_name}", __package__), _name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and gives its exit code.

    0 done, 1 the command found what it looks for (damage, something missing), 2 bad input, 130 interrupted. What the user can mend is
    one line on stderr; anything else is a bug and keeps its traceback, as does everything under TINYONN_DEBUG=1.
    """
    command = get_command(app)
    try:
        name, named = _command_named(command, arguments)
        asked = [*arguments, "--help"] if _is_group(named) and len(name.split()) == len(arguments) + 1 else list(arguments)
        with command.make_context("tinyonn", asked) as context:
            command.invoke(context)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except typer.Exit as end:
        return int(end.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has gone: no one is left to tell. Python must not find out again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        ending = None if os.environ.get("TINYONN_DEBUG") else explain(error, _command_named(command, arguments)[0])
        if ending is None:
            raise
        say(ending.line)
        return ending.code
    return 0


def _is_group(command: Any) -> bool:
    return bool(getattr(command, "commands", {}))


def _command_named(command: Any, arguments: Sequence[str]) -> tuple[str, Any]:
    """`tinyonn`, or with the commands that were named: `tinyonn heads score`; and the last of them."""
    name = "tinyonn"
    for argument in arguments:
        inside = getattr(command, "commands", {})
        if argument in inside:
            name, command = f"{name} {argument}", inside[argument]
    return name, command
