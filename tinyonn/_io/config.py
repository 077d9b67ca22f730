"""Options of a command: a frozen dataclass, from a YAML file or a mapping, with one clear line for what can be wrong.

The checks are for `__post_init__`; each reads the field called `name` and raises InputError that names it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import InputError, did_you_mean, listed, reason, shown
from .folders import is_adapter
from .hub import is_hub_id

# Precisions by the names that options and files have; the spellings that people type for each, without case and "torch.".
DTYPES = ("auto", "fp32", "bf16", "fp16")
_DTYPE_SPELLINGS = {
    "auto": "auto",
    **dict.fromkeys(("fp32", "float32", "f32", "float", "single"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "f16", "half"), "fp16"),
}

MAX_INT, MAX_SEED = 2**31 - 1, 2**63 - 1  # what sizes and seeds may be in the libraries that they are given to


def read_yaml(path: str | os.PathLike[str], name: str = "config", /, **overrides: Any) -> dict[str, Any]:
    """Options from a YAML mapping; hyphens in keys become underscores. `overrides` that are not None win over the file.

    Aliases are refused: a few lines of them stand for more values than a memory holds.

    Args:
        path: the file.
        name: of the option that gave it, for messages.
        **overrides: more options.

    Raises:
        InputError: the file is missing, not a mapping, or has an alias.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 2e-5 and 1.5e3 as numbers, as YAML 1.2 does; PyYAML wants a point and a sign."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} must be written out", event.start_mark)
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: dict[str, Any] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, key) is not key:
                    raise yaml.composer.ComposerError(None, None, f"the key {shown(key.value)} is given twice", key.start_mark)
            return node

    with_exponent = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$", re.ASCII)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", with_exponent, list("-+.0123456789"))

    file = Path(path)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
        if isinstance(content, Mapping):
            content = {str(key): value for key, value in content.items()}
    except OSError as error:
        raise InputError(f"{name} must be a readable file, got {file}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no YAML, no UTF-8, no such day, nesting without end
        raise InputError(f"{name} must be valid YAML, got {file}: {_yaml_fault(error)}.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{name} must be a YAML mapping of options, got {type(content).__name__} in {file}.")
    options: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in content.items():
        option = key.replace("-", "_")
        if spelled.setdefault(option, key) != key:
            raise InputError(f"{name} must give an option once, got {shown(spelled[option])} and {shown(key)} in {file}.")
        options[option] = value
    given = {name: value for name, value in overrides.items() if value is not None}
    return {**options, **given}


def _yaml_fault(error: Exception) -> str:
    """What is wrong and where; PyYAML's own text repeats the file's name and prints the line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark and problem else reason(error, 100).removesuffix(".")


class Options:
    """Base of a frozen dataclass of options; what has no default must be given."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Options from a YAML mapping; keys may have hyphens. `overrides` that are not None win over the file.

        Raises:
            InputError: the file is missing, not a mapping, or lacks what must be given; an unknown key (near names are given).
        """
        return cls.from_mapping(read_yaml(path, **overrides), source=os.fspath(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "config") -> Self:
        """Options from a mapping whose keys are the fields.

        Args:
            source: where the values are from, for messages.

        Raises:
            InputError: an unknown key (near names are given), or one is missing that must be given.
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


def check_text(config: object, name: str, *, optional: bool = False) -> None:
    """Text that can be in a file's name or metadata; a path becomes text; None only where `optional`."""
    value = getattr(config, name)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        object.__setattr__(config, name, value)
    elif not (optional and value is None) and (not isinstance(value, str) or not value):
        raise InputError(f"{name} must be a non-empty string, got {shown(value)}.")
    text = value or ""
    if "\0" in text or text != text.encode(errors="replace").decode():  # no file has such a name, and no metadata
        raise InputError(f"{name} must be Unicode text without NUL, got {shown(text)}.")


def check_choice(config: object, name: str, choices: Sequence[Any]) -> None:
    """One of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(str(c) for c in choices)}, got {shown(value)}{did_you_mean(value, choices)}")


def dtype_name(value: object, name: str = "dtype") -> str:
    """The name in DTYPES of a precision: "float32", "torch.bfloat16", torch.float16 and "half" are understood, in any case.

    Raises:
        InputError: another value.
    """
    spelling = str(value).strip().casefold().removeprefix("torch.") if isinstance(value, str) or _is_torch_dtype(value) else None
    if spelling in _DTYPE_SPELLINGS:
        return _DTYPE_SPELLINGS[spelling]
    near = did_you_mean(spelling, _DTYPE_SPELLINGS)
    raise InputError(f"{name} must be one of {', '.join(DTYPES)}, got {shown(value)}{near}")


def _is_torch_dtype(value: object) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "dtype"  # torch itself takes a second to import


def check_dtype(config: object, name: str = "dtype") -> None:
    """A precision, in any spelling that `dtype_name` knows; the field then holds its name in DTYPES."""
    object.__setattr__(config, name, dtype_name(getattr(config, name), name))


def check_int(config: object, name: str, minimum: int, maximum: int = MAX_INT) -> None:
    """A whole number from `minimum` to `maximum`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} must be a whole number of at least {minimum}, got {shown(value)}.")
    if value > maximum:
        raise InputError(f"{name} must be at most {maximum}, got {shown(value)}.")


def check_number(
    config: object, name: str, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None
) -> None:
    """A number that a float holds; where any bound is given, within the bounds (`above` excludes its own) and finite."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} must be a number, got {shown(value)}.")
    try:
        float(value)
    except OverflowError:
        raise InputError(f"{name} must be a number that a float holds, got {shown(value)}.") from None
    bounds = (("at least", minimum), ("above", above), ("at most", maximum))
    rules = [f"{words} {bound:,.12g}" for words, bound in bounds if bound is not None]
    if not rules:
        return
    if maximum is None:
        rules.append("finite")
    above_lowest = (minimum is None or value >= minimum) and (above is None or value > above) and value > -math.inf
    below_highest = value < math.inf if maximum is None else value <= maximum
    if not (above_lowest and below_highest):
        raise InputError(f"{name} must be {' and '.join(rules)}, got {value}.")


def local_model(model_path: str) -> Path | None:
    """The folder of a model or adapter; None for what may be the name of one on the hub. Looks for its configuration alone.

    Raises:
        InputError: no such folder, or no model in it.
    """
    path = Path(model_path).expanduser().absolute()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            held = listed(sorted(entry.name for entry in path.iterdir()), 4, none="nothing")
            raise InputError(f"model_path must be a folder with config.json, got {model_path} (holds {held}).")
        return path
    if path.exists() or not is_hub_id(model_path):
        raise InputError(f"model_path must be an existing folder or a hub id, got {model_path}.")
    return None


def check_bool(config: object, name: str) -> None:
    """A truth value."""
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {shown(value)}.")


def check_device(config: object, name: str = "device") -> None:
    """The name of a device, there or not: auto, cpu, cuda or cuda:N."""
    value = getattr(config, name)
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise InputError(f"{name} must be auto, cpu, cuda or cuda:N, got {shown(value)}.")
