"""Records that the steps of a plasticity study leave for each other, read with every field that the later steps need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..._io.files import digest
from ..._io.records import short
from ..study import (
    MEASURE_AGAIN,
    MEASURE_STEP,
    MEASURED,
    PARTS,
    SUBSET,
    TRAIN_AGAIN,
    TRAIN_STEP,
    TRAINED,
    StepFileError,
    check_fields,
    is_finite,
    read_record,
)

TRAINED_FIELDS = {
    **dict.fromkeys(("options", "checkpoints"), "an object"),
    "data": "text",
    "losses": "a list",
    **dict.fromkeys(("train_rows", "steps"), "a whole number"),
    **dict.fromkeys(("accuracy", "seconds"), "a number"),
}
MEASURED_FIELDS = {
    "model": "text",
    **dict.fromkeys(("samples", "layers", "heads"), "a whole number"),
    **dict.fromkeys(("base_loss_pre", "base_loss_post", "base_accuracy_pre", "base_accuracy_post", "seconds"), "a number"),
}
PART_FIELDS = {"sha256": "text", "layers": "a whole number", "heads": "a whole number", "seconds": "a number", "facts": "an object"}


def read_trained(folder: Path) -> dict[str, Any]:
    """The content of train.json.

    Raises:
        InputError: it is missing, damaged or of a training that took no step; the line names the command to run.
    """
    path = folder / TRAINED
    trained = read_record(path, TRAINED_FIELDS, TRAIN_STEP, TRAIN_AGAIN)
    check_fields(path, trained["options"], {"seed": "a whole number", "model_path": "text"}, TRAIN_AGAIN)
    if wrong := [loss for loss in trained["losses"] if not is_finite(loss)]:
        raise StepFileError(path, f"have numbers as losses, got {short(wrong[0])}", TRAIN_AGAIN)
    if trained["steps"] < 1:
        raise StepFileError(path, f"be of a training of at least one step, got {trained['steps']}", TRAIN_AGAIN)
    return trained


def read_measured(folder: Path) -> dict[str, Any]:
    """The content of measure.json.

    Raises:
        InputError: it is missing or damaged; the line names the command to run.
    """
    return read_record(folder / MEASURED, MEASURED_FIELDS, MEASURE_STEP)


def read_subset(folder: Path) -> list[Any]:
    """Numbers of the rows that were measured, of eval_subset.json.

    Raises:
        InputError: it is missing or damaged; the line names the command to run.
    """
    rows: list[Any] = read_record(folder / SUBSET, {"indices": "a list"}, MEASURE_STEP, MEASURE_AGAIN)["indices"]
    return rows


def check_seed(folder: Path, trained: Mapping[str, Any]) -> None:
    """Refuses a folder seedN that holds the training of another seed: a copy, which would count twice.

    Args:
        folder: OUTPUT/TASK/seedN; under another name anything may lie there.
        trained: content of its train.json.

    Raises:
        StepFileError: naming both seeds.
    """
    name, seed = folder.resolve().name, trained["options"]["seed"]
    if re.fullmatch(r"seed[0-9]+", name) and name != f"seed{seed}":
        raise StepFileError(folder / TRAINED, f"be of the seed that its folder {name} names, got that of seed {seed}", TRAIN_AGAIN)


def check_parts(folder: Path, names: Iterable[str]) -> None:
    """Refuses files that are not those which `measure` recorded: edited, swapped, of another seed or another training.

    Args:
        folder: OUTPUT/TASK/seedN.
        names: of the measured files.

    Raises:
        StepFileError: naming the first that is another.
    """
    record = read_record(
        folder / PARTS, {"training_sha256": "text", "subset_sha256": "text", "parts": "an object"}, MEASURE_STEP, MEASURE_STEP
    )
    wanted = {TRAINED: record["training_sha256"], SUBSET: record["subset_sha256"]}
    for name in names:
        part = record["parts"].get(name)
        wanted[name] = part.get("sha256") if isinstance(part, dict) else None
    for name, checksum in wanted.items():
        if digest(folder / name) != checksum:
            step = MEASURE_AGAIN if name == SUBSET else MEASURE_STEP
            raise StepFileError(folder / name, f"be the file that {PARTS} has the checksum of, got another", step)
