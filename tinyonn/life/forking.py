"""Fork of a training folder: a new life that begins at a kept step of another one, in a folder where `tinyonn train` goes on.

FOLDER/parent.yaml   life and step that it was forked from, and the options of that life

Until the fork has saved a step of its own, `tinyonn train` takes other values of the options in `FORKABLE` and keeps them in options.yaml.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .._io.config import read_yaml
from .._io.files import link_or_copy
from .._io.new_folder import new_folder
from ..errors import InputError
from ..store.forking import note_fork, shared_bytes, write_fork
from ..store.manifest import Manifest
from ..store.overview import find_store, newest_step
from .config import LifeConfig
from .log_files import cut_log

OPTIONS, ORIGIN, TOKENS, TOKENIZER, STORE = "options.yaml", "parent.yaml", "tokens.npy", "tokenizer", "store"
HELD_OUT = "held_out.txt"  # of a training on ARC
DATA = ("data_path", "suffix", "text_field")  # options that decide the tokens
RATE = ("learning_rate", "schedule", "warmup_steps")
# Options that may differ between the runs of one life.
FREE = (
    "output_dir",
    "steps",
    "log_steps",
    "eval_steps",
    "save_steps",
    "keep",
    "max_bad_steps",
    "dtype",
    "device",
    "fsdp",
    "gradient_checkpointing",
)
# Options that the first run of a fork may change, besides those.
FORKABLE = (
    *DATA,
    *RATE,
    *("context", "batch_size", "eval_size", "weight_decay", "max_grad_norm"),
    *("alpha", "gamma", "pruning_threshold", "growth_threshold", "w_ce", "w_kl", "drive_weights"),
)


@dataclass(frozen=True)
class Origin:
    """What a fork came from.

    Attributes:
        step: kept step of the parent, at which the fork began.
        options: those that all runs of the parent share.
        schedule_begin: step at which the parent's schedule of the learning rate began.
    """

    step: int
    options: dict[str, Any]
    schedule_begin: int

    def changes(self, options: dict[str, Any]) -> dict[str, list[Any]]:
        """Option -> its value in the parent and its value now, of those that differ."""
        return {name: [self.options.get(name), value] for name, value in options.items() if self.options.get(name) != value}

    def schedule_now(self, options: dict[str, Any]) -> int:
        """Step at which the fork's schedule begins: that of the fork, if it changes the learning rate; else that of the parent."""
        return self.step if any(name in self.changes(options) for name in RATE) else self.schedule_begin


def fork_life(source: str | os.PathLike[str], target: str | os.PathLike[str], step: int | None = None) -> Manifest:
    """Makes a folder in which `tinyonn train` goes on from a kept step of another one, whose trainer may run meanwhile.

    Segments and tokens are hard links, or copies on another disk. The log ends at the step. The model, the pages and TensorBoard's files
    are left out; training writes them again. A folder with only a store becomes a store.

    Args:
        source: folder of `tinyonn train`, or a store.
        target: the new folder; must not exist, or be empty. After an error it is as before.
        step: a kept step; None for the newest.

    Returns:
        The manifest of the new store.

    Raises:
        InputError: the step is not kept; target is not empty or cannot be written.
    """
    source, target = Path(source), Path(target)
    store = find_store(source, "source")
    with new_folder(target) as partial:
        whole = is_training(source)
        manifest = write_fork(store, partial / STORE if whole else partial, step)
        if whole:
            assert manifest.parent is not None
            _write_rest(source, partial, manifest.parent)
    note_fork(store, manifest, target / STORE if whole else target)
    return manifest


def is_training(folder: Path) -> bool:
    """Whether a folder is one of `tinyonn train`; otherwise it is a store, or has nothing but a store."""
    return (folder / OPTIONS).is_file() and find_store(folder) == folder / STORE


def linked_bytes(source: str | os.PathLike[str], step: int | None = None) -> int:
    """Bytes of the files that `fork_life` links."""
    folder = Path(source)
    tokens = folder / TOKENS
    return shared_bytes(find_store(folder, "source"), step) + (tokens.stat().st_size if is_training(folder) and tokens.is_file() else 0)


def read_origin(folder: Path) -> Origin | None:
    """What the life in a folder was forked from; None for one that began by itself.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / ORIGIN
    if not file.is_file():
        return None
    found = read_yaml(file, "output_dir")
    try:
        return Origin(int(found["step"]), dict(found["options"]), int(found["schedule_begin"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{file} must have step, options and schedule_begin, as `tinyonn life fork` writes it.") from None


def read_options(folder: Path, name: str = "output_dir") -> dict[str, Any]:
    """The options in a folder; those that are missing have the values that an earlier version trained with.

    Raises:
        InputError: the file is damaged.
    """
    defaults = {field.name: field.default for field in fields(LifeConfig) if field.default is not MISSING} | {"freeze_idle": False}
    kept = read_yaml(folder / OPTIONS, name)
    return {name: kept.get(name, default) for name, default in defaults.items() if name not in FREE} | kept


def is_fresh(folder: Path, origin: Origin | None) -> bool:
    """Whether a fork has no step of its own yet."""
    return origin is not None and newest_step(folder / STORE) == origin.step


def _write_rest(source: Path, target: Path, parent: dict[str, Any]) -> None:
    """All but the store."""
    options = read_options(source, "DIR")
    before = read_origin(source)
    origin = parent | {"schedule_begin": before.schedule_now(options) if before is not None else 0, "options": options}
    (target / ORIGIN).write_text(yaml.safe_dump(origin, sort_keys=False), encoding="utf-8")
    shutil.copyfile(source / OPTIONS, target / OPTIONS)
    if (source / HELD_OUT).is_file():
        shutil.copyfile(source / HELD_OUT, target / HELD_OUT)
    if (source / TOKENS).is_file():
        link_or_copy(source / TOKENS, target / TOKENS)
    if (source / TOKENIZER).is_dir():
        shutil.copytree(source / TOKENIZER, target / TOKENIZER)
    cut_log(source / "log", target / "log", parent["step"])
