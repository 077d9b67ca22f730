"""Command-line options from a dataclass of `Options`, and options that several commands share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .._io.options import REQUIRED, Option, Options, commented_yaml, declared_options, descriptions
from ..scan.config import ScanConfig

ConfigT = TypeVar("ConfigT", bound=Options)

Output = Annotated[Path, typer.Option("--output-path", "-o", metavar="PATH", help="The new file.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw PNGs beside the page.")]
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of these options; the command line takes precedence.")]


def takes_options(
    config: type[Options],
    *,
    before: str = "",
    only: Collection[str] = (),
    without: Collection[str] = (),
    several: Collection[str] = (),
    texts: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of a dataclass.

    The command's parameter `given` receives the typed values as a dict. In the help, the options take the place of that parameter.

    Args:
        config: the class of the options.
        before: field before which the help lists the parameters that follow `given`; empty for after all fields.
        only, without: fields to include (empty for all), and fields to exclude.
        several: fields whose option may be repeated; their value is a list.
        texts: field -> help text that replaces the field's own text and default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        made = _parameters(config, several, texts or {})
        made = {name: made[name] for name in made if name not in without and (not only or name in only)}
        place, split = list(own).index("given"), list(made).index(before) if before else len(made)
        names = [*list(own)[:place], *list(made)[:split], *list(own)[place + 1 :], *list(made)[split:]]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {name: values.pop(name) for name in made}
            given = {name: value for name, value in typed.items() if value is not None}
            command(given={name: str(value) if isinstance(value, StrEnum) else value for name, value in given.items()}, **values)

        parameters = [(made[name] if name in made else own[name]).replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(config: type[Options], several: Collection[str], texts: Mapping[str, str]) -> dict[str, inspect.Parameter]:
    """Field -> a parameter that Typer turns into its option. None is its default, so that only options that were typed have a value."""
    types, described, found = typing.get_type_hints(config), descriptions(config), {}
    for field, declared in declared_options(config):
        if not declared.on_command_line:
            continue
        name, metavar, flag = field.name, declared.metavar, f"--{field.name.replace('_', '-')}"
        kind: Any = next(kind for kind in (*typing.get_args(types[name]), types[name]) if kind is not type(None))
        if kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        if choices := getattr(declared.check, "choices", ()):
            kind, metavar = StrEnum(name, {choice: choice for choice in choices}), "|".join(choices)
        text = texts.get(name) or _help(described.get(name, ""), field.default, declared)
        annotation: Any = Annotated[
            (list[kind] if name in several else kind) | None,
            typer.Option(flag, *declared.flags, help=text, metavar=metavar, show_default=False),
        ]
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return found


def _help(text: str, default: Any, declared: Option) -> str:
    """The description of an option as a sentence, with its default."""
    if isinstance(default, bool):
        shown: str | None = "yes" if default else "no"
    elif default in (None, REQUIRED):
        shown = declared.unset
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text[:1].upper()}{text[1:]}" + (f" [default: {shown}]" if shown else "")


def configured(config: type[ConfigT], file: Path | None, given: Mapping[str, Any]) -> ConfigT:
    """Options from a config file, if there is one, and from what was typed, which takes precedence."""
    return config.from_yaml(file, **given) if file else config.from_mapping(given, source="a --config file")


def print_config_option(config: type[Options], header: str) -> Any:
    """`--print-config`: prints a config file with all options, and stops before other options are checked."""

    def stop(wanted: bool) -> None:
        if wanted:
            print(commented_yaml(config, header), end="")
            raise typer.Exit

    text = "Print a config file with all options, their defaults and descriptions, and stop."
    return typer.Option("--print-config", help=text, callback=stop, is_eager=True)


takes_coding = takes_options(
    ScanConfig, only=("codec", "compression"), texts={"codec": "log2u16: 2 bytes a value. f32: 4 bytes, exact. [default: see above]"}
)
