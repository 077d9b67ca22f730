"""Options of a command, each declared once: as a field of a frozen dataclass, described in the class's docstring.

    @dataclass(frozen=True)
    class Config(Options):
        \"""Options of the command.

        Args:
            batch_size: sequences in one forward pass.
        \"""

        batch_size: int = option(4, integer(1), "N", "-b")

`Config(batch_size=8)`, `Config.from_yaml(file)` and `Config.from_mapping(values)` check the values. `commented_yaml(Config, ...)` writes a
config file, and `cli.options.takes_options` builds the command line. Both describe an option in the words of the docstring.

A check takes a value and the name of its option. It returns the value to keep, or raises InputError.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..errors import InputError, did_you_mean, listed, shown
from .config import read_yaml

Check = Callable[[Any, str], Any]

REQUIRED: Any = dataclasses.MISSING
MAX_INT, MAX_SEED = 2**31 - 1, 2**63 - 1  # limits of sizes and seeds in the libraries that receive them


@dataclass(frozen=True)
class Option:
    """Metadata of a field, as `option` takes them."""

    check: Check
    metavar: str | None
    flags: tuple[str, ...]
    unset: str | None
    section: str | None
    on_command_line: bool


def option(
    default: Any,
    check: Check,
    metavar: str | None = None,
    *flags: str,
    unset: str | None = None,
    section: str | None = None,
    on_command_line: bool = True,
) -> Any:
    """A field of a subclass of `Options`.

    Args:
        default: default value; REQUIRED for none. Where it is None, None passes unchecked.
        check: check of the value.
        metavar: placeholder for the value in `--help`; None for a switch or a choice.
        *flags: further spellings on the command line, such as "-m".
        unset: meaning of None, for `--help` and config files.
        section: heading above the option in config files.
        on_command_line: False for an option that only Python and config files can set.
    """
    metadata = {"option": Option(check, metavar, flags, unset, section, on_command_line)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of a frozen dataclass of options, which checks the fields made by `option`."""

    def __post_init__(self) -> None:
        for field, declared in declared_options(type(self)):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, declared.check(value, field.name))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Options from a YAML mapping, whose keys may have hyphens. `overrides` that are not None take precedence over the file.

        Raises:
            InputError: the file is missing, is not a mapping, has an unknown key or lacks a required option.
        """
        return cls.from_mapping(read_yaml(path, **overrides), source=os.fspath(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "config") -> Self:
        """Options from a mapping whose keys are the fields.

        Args:
            values: field -> value.
            source: origin of the values, for messages.

        Raises:
            InputError: a key is unknown (the message has similar names), or a required option is missing.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        known = {field.name for field in fields}
        for key in values:
            if key not in known:
                near = did_you_mean(key, sorted(known), 3)
                there = f"; they are {listed((field.name for field in fields), room=48)}." if near == "." else near
                raise InputError(f"{source}: option must be a known one, got {shown(key, 40)}{there}")
        for field in fields:
            if field.default is field.default_factory is dataclasses.MISSING and values.get(field.name) is None:
                raise InputError(f"{field.name} must be given, in {source} or as --{field.name.replace('_', '-')}.")
        return cls(**values)


def check_left_out(options: Options, names: Iterable[str], when: str) -> None:
    """Refuses options that have no effect together with others.

    Args:
        options: the options.
        names: fields that must have their defaults.
        when: end of the sentence "NAME must be left out", such as "for tasks that are not generated".

    Raises:
        InputError: a field has another value; the message names it.
    """
    defaults = {field.name: field.default for field, _ in declared_options(type(options))}
    for name in names:
        if (value := getattr(options, name)) != defaults[name]:
            raise InputError(f"{name} must be left out {when}, got {value}.")


def declared_options(config: type[Options]) -> list[tuple[dataclasses.Field[Any], Option]]:
    """Fields of a class made by `option`, in order, with their metadata."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    return [(field, field.metadata["option"]) for field in fields if "option" in field.metadata]


def descriptions(config: type[Options]) -> dict[str, str]:
    """Option -> its text under "Args:" in the docstring, on one line and without backticks; empty under `python -OO`."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(config.__doc__ or ""), re.MULTILINE)
    entries = re.findall(r"(?m)^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "")
    return {name: " ".join(text.split()).replace("`", "") for name, text in entries}


def commented_yaml(config: type[Options], header: str) -> str:
    """A config file with every option, its default and its description.

    Args:
        config: the class of the options.
        header: comment at the top.
    """
    import yaml

    texts, lines = descriptions(config), textwrap.wrap(header, 130, initial_indent="# ", subsequent_indent="# ")
    for field, declared in declared_options(config):
        default = {} if field.default_factory is not dataclasses.MISSING else field.default
        given = "" if default in (None, REQUIRED) else yaml.safe_dump(default).splitlines()[0]
        empty = "must be given" if default is REQUIRED else declared.unset and f"empty: {declared.unset}"
        choices = " or ".join(getattr(declared.check, "choices", ()))
        comment = "; ".join(filter(None, (texts.get(field.name, "").removesuffix("."), choices, empty)))
        if declared.section is not None:
            lines += ["", f"# {declared.section}"]
        lines += textwrap.wrap(f"# {comment}", 130, initial_indent=f"{f'{field.name}: {given}':<30} ", subsequent_indent=f"{'':30} # ")
    return "\n".join(lines) + "\n"


class one_of:
    """A check: one of some values. `choices` are those that a command line and a config file name, without None."""

    def __init__(self, *values: str | None) -> None:
        self.values = values
        self.choices = [value for value in values if value is not None]

    def __call__(self, value: Any, name: str) -> Any:
        if not isinstance(value, str | None) or value not in self.values:  # an array, compared to a string, is an array
            near = did_you_mean(value, self.choices)
            raise InputError(f"{name} must be one of {', '.join(map(str, self.values))}, got {shown(value)}{near}")
        return value


def non_empty(value: Any, name: str) -> str:
    """A check: text that a file's name and metadata can hold. A path becomes text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise InputError(f"{name} must be a non-empty string, got {shown(value)}.")
    if "\0" in text or text != text.encode(errors="replace").decode():
        raise InputError(f"{name} must be Unicode text without NUL, got {shown(text)}.")
    return text


def integer(minimum: int, maximum: int = MAX_INT) -> Check:
    """A check: a whole number from `minimum` to `maximum`."""

    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name} must be a whole number of at least {minimum}, got {shown(value)}.")
        if value > maximum:
            raise InputError(f"{name} must be at most {maximum}, got {shown(value)}.")
        return value

    return check


def number(*, minimum: float | None = None, above: float | None = None, maximum: float | None = None) -> Check:
    """A check: a number that a float can hold. With any bound, it is finite and within the bounds; `above` excludes its own value."""
    bounds = (("at least", minimum), ("above", above), ("at most", maximum))
    rules = [f"{words} {bound:,.12g}" for words, bound in bounds if bound is not None]
    if rules and maximum is None:
        rules.append("finite")

    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name} must be a number, got {shown(value)}.")
        try:
            float(value)
        except OverflowError:
            raise InputError(f"{name} must be a number that a float holds, got {shown(value)}.") from None
        above_lowest = (minimum is None or value >= minimum) and (above is None or value > above) and value > -math.inf
        below_highest = value < math.inf if maximum is None else value <= maximum
        if rules and not (above_lowest and below_highest):
            raise InputError(f"{name} must be {' and '.join(rules)}, got {value}.")
        return value

    return check


def true_or_false(value: Any, name: str) -> bool:
    """A check: a truth value."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {shown(value)}.")
    return value


def device_name(value: Any, name: str) -> str:
    """A check: auto, cpu, cuda or cuda:N. The device need not exist."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise InputError(f"{name} must be auto, cpu, cuda or cuda:N, got {shown(value)}.")
    return value
