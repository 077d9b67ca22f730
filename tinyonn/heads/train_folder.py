"""The folder that training writes: which options it is of, what is whole in it, and how it is emptied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch

from .._config import read_yaml
from .._files import read_json
from .._study import FINAL, INIT, LATER, OPTIONS, STATE, TRAIN_AGAIN, TRAIN_STEP, TRAINED
from ..errors import InputError
from ..hf.loading import DTYPES
from .classification import find_task
from .plasticity_config import TRAINING, PlasticityConfig


def training_options(config: PlasticityConfig, precision: torch.dtype) -> dict[str, Any]:
    """What decides the outcome, as train_config.yaml has it: paths whole, defaults that depend on task or device filled in."""
    values = {name: getattr(config, name) for name in TRAINING}
    for name in ("model_path", "data_path"):
        if values[name] is not None and os.path.exists(values[name]):
            values[name] = os.path.abspath(values[name])
    values["task"] = os.path.abspath(config.task) if config.task != config.task_name else config.task
    values["eval_size"] = config.eval_size or find_task(config.task).eval_size
    values["dtype"] = next(name for name, dtype in DTYPES.items() if dtype is precision)
    return values


def is_complete(folder: Path) -> bool:
    """Whether a training has ended there and both of its checkpoints are still in place."""
    return (folder / TRAINED).is_file() and (folder / INIT).is_dir() and (folder / FINAL).is_dir()


def check_same(folder: Path, options: dict[str, Any]) -> None:
    """Refuses a folder that holds the training of other options.

    Raises:
        InputError: naming the options that differ.
    """
    path = folder / OPTIONS
    if not path.is_file():
        if (folder / TRAINED).exists():
            raise InputError(f"output_dir must hold {OPTIONS} beside {TRAINED}, got none in {folder}; --overwrite trains again.")
        return
    before = read_yaml(path)
    if differing := [f"{name} {options[name]} (there {before.get(name)})" for name in options if options[name] != before.get(name)]:
        raise InputError(
            f"output_dir must be another one, or --overwrite be given, where options differ from those of the training in {folder}, got "
            f"{', '.join(differing)}."
        )


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of train.json.

    Raises:
        InputError: it is missing or damaged; the line names the command to run.
    """
    return cast(dict[str, Any], read_json(folder / TRAINED, dict, TRAIN_STEP, TRAIN_AGAIN))


def clear(folder: Path) -> None:
    """Takes away what training writes, and what later steps made of it; other files stay."""
    for name in (TRAINED, *LATER, STATE, OPTIONS):  # what marks a step complete goes first
        (folder / name).unlink(missing_ok=True)
    for partial in folder.glob(f".{STATE}-*"):
        partial.unlink()
    for name in (INIT, FINAL):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.rmtree(_partial(folder / name), ignore_errors=True)


def save_model(model: Any, tokenizer: Any, target: Path) -> None:
    """A folder of safetensors, configuration and tokenizer that is there whole or not at all."""
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}-partial")
