"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer


# The choices of ScanConfig, in the form that Typer reads; a test holds the two together.
class Credit(StrEnum):
    full = "full"
    local = "local"


class Store(StrEnum):
    records = "records"
    integral = "integral"


class Codec(StrEnum):
    log2u16 = "log2u16"
    f32 = "f32"


class Compression(StrEnum):
    zstd = "zstd"


class Sync(StrEnum):
    none = "none"
    chunk = "chunk"
    close = "close"


DTYPE = "auto|fp32|bf16|fp16"  # as help has it; the configuration takes other spellings too

Output = Annotated[Path, typer.Option("--output-path", "-o", metavar="PATH", help="The new file.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw PNGs beside the page.")]
CodecChoice = Annotated[
    Codec | None, typer.Option(help="log2u16: 2 bytes a value. f32: 4 bytes, exact. [default: see above]", show_default=False)
]
CompressionChoice = Annotated[Compression | None, typer.Option(help="Compress the values. [default: no]", show_default=False)]


def coding(codec: Codec | None, compression: Compression | None) -> dict[str, str]:
    """What was chosen of the two, as options of a writer."""
    chosen = {"codec": codec, "compression": compression}
    return {name: value.value for name, value in chosen.items() if value is not None}


def field_defaults(config: type) -> dict[str, Any]:
    """The fields of a dataclass of options with their defaults, `dataclasses.MISSING` for those that have none."""
    return {field.name: field.default for field in dataclasses.fields(config)}


def config_option(defaults: Mapping[str, Any], field: str, text: str, metavar: str | None = None, *names: str) -> Any:
    """An option for a field of a dataclass. It has no default of its own, so that a config file's value stands unless it is given.

    Args:
        defaults: `field_defaults` of the dataclass; the field's is told in the help.
        field: its name; `--field-name` is the option's, with `--no-field-name` for a truth value.
        text: of the help.
        metavar: stands for the value in the help; None where it has choices.
        *names: short ones, such as "-m".
    """
    default = defaults[field]
    flag = f"--{field.replace('_', '-')}"
    if isinstance(default, bool):
        flag = f"{flag}/--no-{field.replace('_', '-')}"
        text += f" [default: {'yes' if default else 'no'}]"
    elif default not in (None, dataclasses.MISSING):
        text += f" [default: {default:g}]" if isinstance(default, float) else f" [default: {default}]"
    return typer.Option(flag, *names, help=text, metavar=metavar, show_default=False)


def print_config_option(package: str, file: str) -> Any:
    """`--print-config`: prints a package's file of commented defaults, and stops before anything else is looked at."""

    def stop(wanted: bool) -> None:
        if wanted:
            print(resources.files(package).joinpath(file).read_text(encoding="utf-8"), end="")
            raise typer.Exit

    text = "Print a config file with all defaults, explained, and stop."
    return typer.Option("--print-config", help=text, callback=stop, is_eager=True)


def given_options(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a command was given, out of its `locals()`; choices as text."""
    given = {name: value for name, value in values.items() if name in defaults and value is not None}
    return {name: str(value) if isinstance(value, StrEnum) else value for name, value in given.items()}
