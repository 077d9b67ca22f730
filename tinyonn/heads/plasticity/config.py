"""What a plasticity study does: every option, checked once, in one frozen object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..._io.config import MAX_SEED, Options, check_bool, check_device, check_dtype, check_int, check_number, check_text
from ...errors import InputError, shown

# The options that decide what comes out of training; the device does up to rounding, and dtype counts as what "auto" comes to on it.
TRAINING = (
    "model_path",
    "task",
    "data_path",
    "seed",
    "eval_size",
    "eval_seed",
    "train_size",
    "max_length",
    "batch_size",
    "learning_rate",
    "epochs",
    "max_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "dtype",
    "skip_unlabelled",
)


@dataclass(frozen=True)
class PlasticityConfig(Options):
    """Options of one plasticity study: a model, a task, a seed.

    Args:
        model_path: folder of a transformer, or a hub id.
        task: mnli, rte, boolq or the path of a YAML file.
        data_path: a file of rows, of which some are held out, or a folder with train.jsonl and validation.jsonl; None for the task's
            data set of the `datasets` package.
        output_dir: results go to OUTPUT_DIR/TASK/seedSEED.
        seed: of the new classifier, of the order of the training rows and of dropout.
        eval_size: rows that heads are measured on; None for the task's own number (rte 277), 1024 where it has none.
        eval_seed: which rows these are; the same for every `seed`.
        skip_unlabelled: leave out rows without a label (missing, null, blank, NaN, "-" or -1), which stop the run otherwise.
        train_size: at most so many rows are trained on; None for all.
        top_k: heads compared by their overlap.
        high: percentile from which a value counts as high.
        low: percentile up to which a value counts as low.
        max_length: tokens kept of each row.
        batch_size: rows in one step.
        learning_rate: at its height, after the warm-up; falls to 0 along a line.
        epochs: passes over the training rows.
        max_steps: training ends after so many steps at the latest; None for all epochs.
        warmup_ratio: share of the steps over which the learning rate rises.
        weight_decay: of matrices; biases and norms have none.
        max_grad_norm: gradients are scaled down to this norm.
        checkpoint_steps: steps between two states that an interrupted training goes on from.
        dtype: precision of the matrix products, "auto" is bf16 where the GPU has it, fp16 on other GPUs, fp32 on a CPU. Weights and
            optimiser are always fp32.
        device: "auto" (the first GPU, else the CPU) or a torch device.
        overwrite: replace what another configuration left in the same folder.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    model_path: str
    task: str
    data_path: str | None = None
    output_dir: str = "data/plasticity"
    seed: int = 42
    eval_size: int | None = None
    eval_seed: int = 999
    skip_unlabelled: bool = False
    train_size: int | None = None
    top_k: int = 20
    high: float = 90.0
    low: float = 30.0
    max_length: int = 128
    batch_size: int = 32
    learning_rate: float = 2e-5
    epochs: int = 3
    max_steps: int | None = None
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_steps: int = 200
    dtype: str = "auto"
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("model_path", "task", "output_dir"):
            check_text(self, name)
        check_text(self, "data_path", optional=True)
        check_dtype(self)
        for name in ("overwrite", "skip_unlabelled"):
            check_bool(self, name)
        for name, least in (("top_k", 1), ("max_length", 4), ("batch_size", 1), ("epochs", 1)):
            check_int(self, name, least)
        check_int(self, "checkpoint_steps", 1)
        if isinstance(self.seed, list | tuple):
            raise InputError(f"seed must be one whole number, got {shown(self.seed)}; for several, repeat --seed on the command line.")
        for name in ("seed", "eval_seed"):
            check_int(self, name, 0, MAX_SEED)
        for name in ("eval_size", "train_size", "max_steps"):
            if getattr(self, name) is not None:
                check_int(self, name, 1)
        check_number(self, "learning_rate", above=0, maximum=1)
        check_number(self, "max_grad_norm", above=0)
        for name in ("weight_decay", "warmup_ratio"):
            check_number(self, name, minimum=0, maximum=1)
        for name in ("high", "low"):
            check_number(self, name, minimum=0, maximum=100)
        if self.low >= self.high:
            raise InputError(f"low must be below high ({self.high}), got {self.low}.")
        check_device(self)
        if not re.fullmatch(r"[\w.-]{1,200}", self.task_name) or not re.search(r"\w", self.task_name):
            raise InputError(
                f"task must be a name or a YAML file whose name is at most 200 letters, digits, '.', '_' or '-', got {shown(self.task)}."
            )

    @property
    def task_name(self) -> str:
        """The task's name, or that of its YAML file."""
        return Path(self.task).stem if self.task.endswith((".yaml", ".yml")) else self.task

    @property
    def folder(self) -> Path:
        """Where the results of this seed go."""
        return Path(self.output_dir) / self.task_name / f"seed{self.seed}"
