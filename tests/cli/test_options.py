"""Options of a dataclass on the command line: their spellings, their help, and a value only for those that were typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tinyonn._io.options import REQUIRED, Options, integer, non_empty, number, one_of, option, true_or_false
from tinyonn.cli.options import takes_options


@dataclass(frozen=True)
class Config(Options):
    """Options.

    Args:
        model_path: folder of
            a `model`.
        rate: rate of learning.
        most: largest number.
        limit: limit.
        keep_all: keep all.
        mode: mode of work.
    """

    model_path: str = option(REQUIRED, non_empty, "PATH", "-m")
    rate: float = option(2e-5, number(above=0), "X")
    most: int = option(20, integer(1), "N")
    limit: int | None = option(None, integer(1), "N", unset="none")
    keep_all: bool = option(True, true_or_false)
    mode: str = option("two_steps", one_of("one_step", "two_steps"))
    hidden: Mapping[str, int] = option({}, lambda value, name: value, on_command_line=False)


def run(*arguments: str, **how: Any) -> tuple[str, Any]:
    received: list[Any] = []
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    @app.command()
    @takes_options(Config, **how)
    def command(given: Mapping[str, Any], own: Annotated[str, typer.Option(metavar="T", help="Own.")] = "mine") -> None:
        received.append((given, own))

    output = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False).output
    return output, received[0] if received else None


def listed(**how: Any) -> list[str]:
    lines = (line.split(maxsplit=2) for line in run("--help", **how)[0].split("Options:")[1].splitlines() if line.startswith("  -"))
    return [" ".join(line) for line in lines]


def test_an_option_has_the_words_of_the_docstring_and_its_default() -> None:
    assert [" ".join(line.split()) for line in listed()] == [
        "-m, --model-path PATH Folder of a model.",
        "--rate X Rate of learning. [default: 2e-05]",
        "--most N Largest number. [default: 20]",
        "--limit N Limit. [default: none]",
        "--keep-all / --no-keep-all Keep all. [default: yes]",
        "--mode one_step|two_steps Mode of work. [default: two_steps]",
        "--own T Own. [default: mine]",
        "--help Show this message and exit.",
    ]


def test_a_command_s_own_parameters_stand_where_it_says() -> None:
    assert [line.split()[0] for line in listed(before="limit", without=("rate", "mode"))][:5] == [
        "-m,",
        "--most",
        "--own",
        "--limit",
        "--keep-all",
    ]
    assert [line.split()[0] for line in listed(only=("rate",))] == ["--rate", "--own", "--help"]


def test_only_what_was_typed_is_passed_on() -> None:
    assert run() == ("", ({}, "mine"))
    typed = ["--no-keep-all", "--limit", "0", "--own", "x", "-m", "m", "--mode", "one_step"]
    given = run(*typed)[1][0]
    assert given == {"model_path": "m", "keep_all": False, "limit": 0, "mode": "one_step"}
    assert type(given["mode"]) is str


def test_an_option_may_be_repeated_and_have_other_words() -> None:
    assert run("--limit", "3", "--limit", "4", several=("limit",))[1] == ({"limit": [3, 4]}, "mine")
    assert "--limit N Limits." in [" ".join(line.split()) for line in listed(several=("limit",), texts={"limit": "Limits."})]


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="modle_path"):
        run(before="modle_path")
