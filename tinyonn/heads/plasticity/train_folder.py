"""Folder of a training: its options, checks of its files, and their deletion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..._io.config import read_yaml
from ..._io.files import digest
from ..._io.locks import locked
from ..._io.records import short
from ...errors import InputError, listed, path_tail, reason
from ...hf.loading import DTYPES, weight_files
from ..step_files import StepFileError
from ..study import ADDED_OPTIONS, FINAL, INIT, LATER, OPTIONS, STATE, TRAIN_AGAIN, TRAINED
from .classification import find_task
from .config import TRAINING, PlasticityConfig
from .records import read_trained


def training_options(config: PlasticityConfig, precision: torch.dtype) -> dict[str, Any]:
    """Options that determine the result, as in train_config.yaml: absolute paths, and defaults that depend on task or device filled in."""
    values = {name: getattr(config, name) for name in TRAINING}
    for name in ("model_path", "data_path"):
        if values[name] is not None and os.path.exists(values[name]):
            values[name] = os.path.abspath(values[name])
    values["task"] = os.path.abspath(config.task) if config.task != config.task_name else config.task
    values["eval_size"] = config.eval_size or find_task(config.task).eval_size
    values["dtype"] = next(name for name, dtype in DTYPES.items() if dtype is precision)
    return values


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks the folder within the block; an empty folder is deleted afterwards."""
    try:
        with locked(folder):
            yield
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def is_complete(folder: Path) -> bool:
    """Whether the folder has a complete training with the weights of both checkpoints, of the recorded sizes.

    Raises:
        InputError: train.json is damaged.
    """
    return (folder / TRAINED).is_file() and changed_checkpoint(folder, read_trained(folder)) is None


def weights_record(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and SHA-256, for the weights of a checkpoint."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in weight_files(checkpoint)}


def changed_checkpoint(folder: Path, trained: Mapping[str, Any], *, thorough: bool = False) -> str | None:
    """Name of a checkpoint whose weights differ from those that its training recorded; None if both agree.

    Args:
        folder: OUTPUT/TASK/seedN.
        trained: content of its train.json.
        thorough: whether to compare checksums, which reads all weights, or only names and sizes.
    """
    names = (INIT, FINAL)
    return next((name for name in names if not has_weights(folder / name, trained["checkpoints"].get(name), thorough=thorough)), None)


def has_weights(checkpoint: Path, record: object, *, thorough: bool) -> bool:
    """Whether the weights of a checkpoint agree with a `weights_record`."""
    try:
        files = {file.name: file for file in weight_files(checkpoint)}
    except InputError:  # its index names files that do not exist
        return False
    if not files or not isinstance(record, dict) or set(files) != set(record):
        return False
    return all(
        isinstance(record[name], dict)
        and record[name].get("bytes") == file.stat().st_size
        and (not thorough or record[name].get("sha256") == digest(file))
        for name, file in files.items()
    )


def check_same(folder: Path, options: dict[str, Any], *, trains: bool = False) -> None:
    """Checks that the training in a folder has these options, and that its record belongs to them.

    Args:
        trains: whether the check is for a training; the message then suggests another folder or `overwrite`.

    Raises:
        InputError: options differ; the message names them.
    """
    path = folder / OPTIONS
    if not path.is_file():
        if (folder / TRAINED).exists():
            raise InputError(f"output_dir must hold {OPTIONS} beside {TRAINED}, got none in {folder}; run {TRAIN_AGAIN}.")
        return
    before = {**ADDED_OPTIONS, **read_yaml(path)}
    if differing := [_difference(name, options[name], before.get(name)) for name in options if options[name] != before.get(name)]:
        if trains:
            rule = f"output_dir must be another one, or --overwrite be given: {folder.name} was trained with other options"
        else:
            rule = f"options must be those of the training in {path_tail(str(folder), 32)} where they are given"
        raise InputError(f"{rule}, got {listed(differing, 4, width=80, room=95)}.")
    if not (folder / TRAINED).exists():
        return
    ended = {**ADDED_OPTIONS, **read_trained(folder)["options"]}
    if other := [name for name in sorted({*before, *ended}) if before.get(name) != ended.get(name)]:
        named = listed((f"{name} {short(ended.get(name))}" for name in other), 4, width=80)
        raise StepFileError(folder / TRAINED, f"be of the options in {OPTIONS}, got other ones ({named})", TRAIN_AGAIN)


def _difference(name: str, now: object, there: object) -> str:
    return f"{name} {path_tail(str(now), 20)} (there {path_tail(str(there), 20)})"


def clear(folder: Path) -> None:
    """Deletes the files of a training and of later steps; other files are kept."""
    for name in (TRAINED, *LATER, STATE, OPTIONS):  # files that mark a step as complete are deleted first
        (folder / name).unlink(missing_ok=True)
    for partial in folder.glob(f".{STATE}-*"):
        partial.unlink()
    for name in (INIT, FINAL):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.rmtree(_partial(folder / name), ignore_errors=True)


def save_model(model: Any, tokenizer: Any, target: Path) -> None:
    """Saves safetensors, configuration and tokenizer to a folder, completely or not at all.

    Raises:
        InputError: the folder cannot be written, for example because the disk is full.
    """
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except Exception as error:  # the tokenizer's library raises plain Exception
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise no_room(target, reason(error)) from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def no_room(target: Path, said: str) -> InputError:
    """Error for a file or folder of a training that could not be written; `said` is the reason."""
    return InputError(f"output_dir must have room for {target.name}, got a write that failed in {target.parent}: {said}.")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}-partial")
