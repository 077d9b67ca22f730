"""Records of the steps of a plasticity study, with checks of the fields that later steps need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._io.files import digest
from ..._io.records import short
from ..step_files import StepFileError, check_fields, is_finite, read_record
from ..study import MEASURE_AGAIN, MEASURE_STEP, MEASURED, PARTS, SUBSET, TRAIN_AGAIN, TRAIN_STEP, TRAINED

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


@dataclass(frozen=True)
class StepResult:
    """Result of `train` or `measure`.

    Attributes:
        folder: folder of the files.
        kept: whether a complete training with the same options, or a complete measurement of the same training, existed already.
        summary: content of train.json or measure.json.
    """

    folder: Path
    kept: bool
    summary: dict[str, Any]


def read_trained(folder: Path) -> dict[str, Any]:
    """Content of train.json.

    Raises:
        InputError: the file is missing, damaged or from a training without steps; the message names the command to run.
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
    """Content of measure.json.

    Raises:
        InputError: the file is missing or damaged; the message names the command to run.
    """
    return read_record(folder / MEASURED, MEASURED_FIELDS, MEASURE_STEP)


def read_subset(folder: Path) -> list[Any]:
    """Numbers of the evaluation rows, from eval_subset.json.

    Raises:
        InputError: the file is missing or damaged; the message names the command to run.
    """
    rows: list[Any] = read_record(folder / SUBSET, {"indices": "a list"}, MEASURE_STEP, MEASURE_AGAIN)["indices"]
    return rows


def seed_folders(root: Path) -> list[tuple[int, Path]]:
    """Numbers and paths of the folders seed0, seed1, … of OUTPUT/TASK, in order."""
    found = ((re.fullmatch(r"seed(0|[1-9][0-9]*)", path.name), path) for path in root.glob("seed*"))
    return sorted((int(name[1]), path) for name, path in found if name and path.is_dir())


def check_seed(folder: Path, trained: Mapping[str, Any]) -> None:
    """Checks that a folder seedN holds the training of seed N, and not a copy of another, which would count twice.

    Args:
        folder: OUTPUT/TASK/seedN; folders with other names are not checked.
        trained: content of its train.json.

    Raises:
        StepFileError: the seeds differ.
    """
    name, seed = folder.resolve().name, trained["options"]["seed"]
    if re.fullmatch(r"seed[0-9]+", name) and name != f"seed{seed}":
        raise StepFileError(folder / TRAINED, f"be of the seed that its folder {name} names, got that of seed {seed}", TRAIN_AGAIN)


def check_parts(folder: Path, names: Iterable[str]) -> None:
    """Checks that files are those that `measure` recorded, and not edited, swapped, or of another seed or training.

    Args:
        folder: OUTPUT/TASK/seedN.
        names: names of the measured files.

    Raises:
        StepFileError: a file differs; the message names the first.
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
