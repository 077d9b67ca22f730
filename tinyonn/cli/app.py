"""The commands of `tinyonn`, and the exit code of a run."""

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

# In the order of use, which is the order in `tinyonn --help`. Each module has a function, or a group of commands, of its own name.
COMMANDS = (
    *(
        "demo",
        "life-demo",
        "arc-demo",
        "doctor",
        "corpus",
        "scan",
        "report",
        "compare",
        "heads",
        "train",
        "eval",
        "life",
        "info",
        "verify",
        "recover",
        "convert",
    ),
    "tune",
)


def _normal(token: str) -> str:
    # The original workflow had --model_path, and users type --output.
    name = token.replace("_", "-")
    return "output-path" if name == "output" else name


app = typer.Typer(
    name="tinyonn",
    help="Scan language models, score their attention heads, and train small models whose experts are born and recycled.",
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
    _command = getattr(importlib.import_module(f".{_name.replace('-', '_')}", __package__), _name.replace("-", "_"))
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0: success. 1: the command found damage or something missing. 2: bad input. 130: interrupted. An error that the user can correct is
    one line on stderr. Any other error is a bug and keeps its traceback, as do all errors under TINYONN_DEBUG=1.
    """
    command = get_command(app)
    try:
        name, named = _command_named(command, arguments)
        asked = [*arguments, "--help"] if _is_group(named) and len(name.split()) == len(arguments) + 1 else list(arguments)
        with command.make_context("tinyonn", asked) as context:
            command.invoke(context)
        if sys.stdout is not None:  # stdout may be closed from the start
            sys.stdout.flush()
    except typer.Exit as end:
        return int(end.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has exited. Python would raise the error again when it closes stdout.
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
    """Name with the commands that were typed, such as `tinyonn heads score`, and the last of these commands."""
    name = "tinyonn"
    for argument in arguments:
        inside = getattr(command, "commands", {})
        if argument in inside:
            name, command = f"{name} {argument}", inside[argument]
    return name, command
