"""Options of a plasticity study."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..._io.config import DTYPE, dtype_name
from ..._io.options import MAX_SEED, REQUIRED, Options, device_name, integer, non_empty, number, option, true_or_false
from ...errors import InputError, shown


def _seed(value: Any, name: str) -> Any:
    """A check: one seed."""
    if isinstance(value, list | tuple):
        raise InputError(f"{name} must be one whole number, got {shown(value)}; for several, repeat --{name} on the command line.")
    return integer(0, MAX_SEED)(value, name)


@dataclass(frozen=True)
class PlasticityConfig(Options):
    """Options of one plasticity study: a model, a task, a seed.

    Args:
        model_path: folder of a transformer, or its name on the hub.
        task: task: mnli, rte, boolq, or a YAML file of your own.
        data_path: file of rows, of which some are held out, or folder with train.jsonl and validation.jsonl.
        output_dir: folder of the results, which go to its subfolder TASK/seedN.
        seed: seed of the new classifier, of the order of training rows and of dropout; repeat --seed for several.
        eval_size: number of rows that heads are measured on, at most as many as there are.
        eval_seed: seed of the choice of these rows, the same for every `seed`.
        skip_unlabelled: leave out rows without a label (missing, null, blank, NaN, "-" or -1), which stop the run otherwise.
        train_size: maximum number of training rows.
        max_length: tokens kept of each row.
        batch_size: rows in one step.
        learning_rate: peak learning rate, reached after the warm-up; it then falls linearly to 0.
        epochs: passes over the training rows.
        max_steps: maximum number of training steps.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: weight decay of matrices; biases and norms have none.
        max_grad_norm: norm to which gradients are clipped.
        checkpoint_steps: steps between two checkpoints, from which an interrupted training continues.
        top_k: number of heads whose overlap is compared.
        high: percentile from which a value counts as high.
        low: percentile up to which a value counts as low.
        dtype: precision of matrix products: auto (bf16, else fp16, on a GPU; fp32 on a CPU), fp32, bf16 or fp16. Weights and optimiser are
            always fp32.
        device: device of the model: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.
        overwrite: replace what another configuration left in the same folder.

    Raises:
        InputError: a value is invalid; the message names the field.
    """

    model_path: str = option(REQUIRED, non_empty, "PATH", "-m", section="Paths and task")
    task: str = option(REQUIRED, non_empty, "NAME|FILE", "-t")
    data_path: str | None = option(None, non_empty, "PATH", "-d", unset="the task's data set on the hub")
    output_dir: str = option("data/plasticity", non_empty, "DIR", "-o", "--output")
    seed: int = option(42, _seed, "N", section="Rows")
    eval_size: int | None = option(None, integer(1), "N", unset="the task's, or 1024")
    eval_seed: int = option(999, integer(0, MAX_SEED), "N")
    skip_unlabelled: bool = option(False, true_or_false)
    train_size: int | None = option(None, integer(1), "N", unset="all")
    max_length: int = option(128, integer(4), "N")
    batch_size: int = option(32, integer(1), "N", section="Training")
    learning_rate: float = option(2e-5, number(above=0, maximum=1), "X")
    epochs: int = option(3, integer(1), "N")
    max_steps: int | None = option(None, integer(1), "N", unset="all")
    warmup_ratio: float = option(0.06, number(minimum=0, maximum=1), "X")
    weight_decay: float = option(0.01, number(minimum=0, maximum=1), "X")
    max_grad_norm: float = option(1.0, number(above=0), "X")
    checkpoint_steps: int = option(200, integer(1), "N")
    top_k: int = option(20, integer(1), "N", section="Report")
    high: float = option(90.0, number(minimum=0, maximum=100), "P")
    low: float = option(30.0, number(minimum=0, maximum=100), "P")
    dtype: str = option("auto", dtype_name, DTYPE, section="All steps")
    device: str = option("auto", device_name, "NAME")
    overwrite: bool = option(False, true_or_false)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise InputError(f"low must be below high ({self.high}), got {self.low}.")
        if not re.fullmatch(r"[\w.-]{1,200}", self.task_name) or not re.search(r"\w", self.task_name):
            raise InputError(
                f"task must be a name or a YAML file whose name is at most 200 letters, digits, '.', '_' or '-', got {shown(self.task)}."
            )

    @property
    def task_name(self) -> str:
        """Name of the task, or of its YAML file."""
        return Path(self.task).stem if self.task.endswith((".yaml", ".yml")) else self.task

    @property
    def folder(self) -> Path:
        """Folder of the results of this seed."""
        return Path(self.output_dir) / self.task_name / f"seed{self.seed}"


# Options that determine the result of training. The device changes only rounding; dtype counts with "auto" resolved.
TRAINING = tuple(
    field.name
    for field in fields(PlasticityConfig)
    if field.name not in ("output_dir", "checkpoint_steps", "top_k", "high", "low", "device", "overwrite")
)
