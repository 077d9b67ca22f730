"""YAML files of options, names of precisions, and folders of models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean, listed, reason, shown
from .folders import is_adapter
from .hub import is_hub_id

# Names of precisions in options and files, and the accepted spellings of each in lower case and without "torch.".
DTYPES = ("auto", "fp32", "bf16", "fp16")
DTYPE = "|".join(DTYPES)  # in the help; other spellings are accepted too
_DTYPE_SPELLINGS = {
    "auto": "auto",
    **dict.fromkeys(("fp32", "float32", "f32", "float", "single"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "f16", "half"), "fp16"),
}


def read_yaml(path: str | os.PathLike[str], name: str = "config", /, **overrides: Any) -> dict[str, Any]:
    """Options from a YAML mapping; hyphens in keys become underscores. `overrides` that are not None take precedence over the file.

    Aliases are refused, because a few lines of them can expand to more values than fit in memory.

    Args:
        path: YAML file.
        name: name of the option that holds the path, for messages.
        **overrides: further options.

    Raises:
        InputError: the file is missing, is not a mapping, or has an alias.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 2e-5 and 1.5e3 as numbers, as YAML 1.2 does; PyYAML requires a point and a sign."""

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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid YAML, UTF-8 or date, or nesting that is too deep
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
    """The fault and its place; PyYAML's own text repeats the file's name and prints the line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}" if mark and problem else reason(error, 100).removesuffix(".")


def dtype_name(value: object, name: str = "dtype") -> str:
    """Name in DTYPES of a precision. Accepts "float32", "torch.bfloat16", torch.float16, "half" and the like, in any case.

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


def local_model(model_path: str) -> Path | None:
    """Folder of a model or adapter; None for a possible name on the hub. Checks only that the configuration file exists.

    Raises:
        InputError: the folder does not exist or holds no model.
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
