"""What the trainings of the command have in common: results, the arguments of transformers' Trainer, signals, and quiet libraries."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from ..hf.loading import resolve_device, resolve_dtype
from ..hf.tiny_onn import TinyOnnConfig
from ..train.onn_trainer import OnnTrainer

EARLIER = "an earlier run did these steps"  # why a run has nothing to do

ProgressCall = Callable[[float | None, str], None]  # the share of the steps that are done, None before the first; and a few words


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run of a training ended with.

    Attributes:
        folder: where all of it is.
        model: folder of the model.
        page: the page.
        steps: steps of the life so far.
        parameters: of the model.
        metrics: the last line of the log.
        stopped: why it stopped before its last step, or that an earlier run did all steps; None otherwise.
        seconds: of this run.
        first: whether this is the first of the processes that trained, which writes.
    """

    folder: Path
    model: Path
    page: Path
    steps: int
    parameters: int
    metrics: dict[str, float]
    stopped: str | None
    seconds: float
    first: bool


class TrainingOptions(Protocol):
    """Options that every training has."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def eval_steps(self) -> int: ...
    @property
    def log_steps(self) -> int: ...
    @property
    def save_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers prints lines and bars of its own; ours are on the screen already."""
    before, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*pin_memory.*")
            yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()


def arguments(config: TrainingOptions, folder: Path) -> TrainingArguments:
    """Arguments of transformers' Trainer for a training in a folder."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device, TinyOnnConfig()) if config.dtype != "auto" or device.type != "cpu" else torch.float32
    board = importlib.util.find_spec("tensorboard") is not None
    wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["DynONNBlock"]}
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": wrapped} if getattr(config, "fsdp", False) else {}
    return TrainingArguments(
        output_dir=str(folder / "log"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        logging_steps=config.log_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        report_to=["tensorboard"] if board else [],
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed % 2**32,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        prediction_loss_only=True,
        **sharded,
    )


class StopSignals(TrainerCallback):
    """Within its `with` block, Ctrl-C and SIGTERM end training after the step, with a save; a second one ends it at once.

    Attributes:
        asked: name of the signal; None if none came.
        trainer: told why it stopped.
    """

    def __init__(self) -> None:
        self.trainer: OnnTrainer | None = None
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # print could be interrupted within another print
                os.write(2, f"\n{self.asked}: training stops and saves after this step; a second signal stops it at once\n".encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        asked = self.asked
        if distributed.is_available() and distributed.is_initialized():  # a signal may reach one process only, or each in another step
            number = torch.tensor(0 if asked is None else signal.Signals[asked].value, device=args.device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            asked = signal.Signals(int(number)).name if int(number) else None  # one that comes meanwhile counts in the next step
        if asked is not None:
            self.asked = asked
            control.should_save = control.should_training_stop = True
            if self.trainer is not None:
                self.trainer.stopped = asked
        return control
