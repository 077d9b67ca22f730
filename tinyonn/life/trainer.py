"""The trainer of a life: its learning rate, and what it tells about the sizes of saves."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback

from .._io.units import readable_bytes
from ..nn.expert_rows import own_part
from ..train.onn_trainer import OnnTrainer


class Rates(Protocol):
    """Options of the learning rate, and the last step."""

    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate at a step of the life.

    Attributes:
        config: with the schedule, its warm-up, and the last step.
        begin: step from which it is counted.
    """

    config: Rates
    begin: int

    def __call__(self, step: int) -> float:
        step, warm = max(0, step - self.begin), self.config.warmup_steps
        if step < warm:
            return step / warm
        share = min(1.0, (step - warm) / max(1, self.config.steps - self.begin - warm))
        match self.config.schedule:
            case "linear":
                return 1.0 - share
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * share))
        return 1.0


class LifeTrainer(OnnTrainer):
    """An OnnTrainer whose learning rate and weight decay are those of the options, also where the store has others, as in a fork."""

    def __init__(self, *args: Any, schedule: Schedule, **kwargs: Any) -> None:
        self._schedule = schedule
        self._decays: list[float] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        trainer: Any = self
        if trainer.lr_scheduler is None:
            schedule = self._schedule
            of = trainer.optimizer if optimizer is None else optimizer
            trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(of, lambda step: schedule(step))
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        found = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        trainer: Any = self
        rate, scheduler = trainer.args.learning_rate, trainer.lr_scheduler
        scheduler.base_lrs = [rate] * len(self._decays)
        now = rate * self._schedule(scheduler.last_epoch)
        for group, decay in zip(trainer.optimizer.param_groups, self._decays, strict=True):
            group |= {"lr": now, "initial_lr": rate, "weight_decay": decay}
        scheduler._last_lr = [now] * len(self._decays)
        return found


class Sizes(TrainerCallback):
    """Tells before the first step from where training goes on, and how much the saves will write."""

    def __init__(self, trainer: OnnTrainer, note: Callable[[str], None]) -> None:
        self._trainer, self._note = trainer, note

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer: Any = self._trainer
        store = self._trainer.store
        assert store is not None
        groups = trainer.optimizer.param_groups
        waiting = [one for group in groups for one in group["params"] if one not in trainer.optimizer.state]
        moments = sum(2 * one.numel() * one.element_size() for one in map(own_part, waiting))  # that AdamW makes in the first step
        whole = readable_bytes((store.state_bytes() + moments) * (args.world_size if trainer.is_fsdp_enabled else 1))
        free = readable_bytes(shutil.disk_usage(store.folder).free)
        if store.step is None:
            text = f"the first save writes the whole state, at most about {whole}, and later saves only what changes"
        else:
            self._note(f"going on from step {store.step:,}, up to step {state.max_steps:,}")
            text = f"the whole state is at most about {whole}, and a save writes only what changes"
        self._note(f"store: {text}; {free} are free on its disk")
