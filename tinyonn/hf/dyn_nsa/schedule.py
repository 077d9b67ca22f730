"""The schedule that lowers the number of key blocks during training."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...errors import InputError
from ...nn.dyn_nsa import MIN_MAX_BLOCKS, OPEN
from ...ops._checks import check_number
from .._converted import converted_model, recorded
from ..peft_parts import adapter_of, frozen, keep_in_adapter, remedy
from .parts import DYN_NSA, PART, cores, loss_was_taken, mean_blocks


class BudgetSchedule(TrainerCallback):
    """Lowers the key blocks that a converted model reads, from all of them to a budget. Use it as a Trainer's callback, or call `apply`
    before each step of your own loop.

    With s the fraction of `steps` optimiser steps done, opening is start · (1 - s)³: it rises from the value that the conversion set,
    usually -30, to 0, where the learned thresholds alone decide. The target of the budget loss is start^(1 - s) · target^s. A Trainer logs
    the mean number of key blocks since its last log as `key_blocks`, and the target as `key_blocks_target`.

    Args:
        target: key blocks per query at the end, forced blocks included; at least 3, the number of forced blocks.
        steps: optimiser steps until the target holds. If the training has fewer, it ends above the budget, with a warning.
        start: target of the loss at the beginning.
        weight: weight of the budget loss.
        max_blocks: largest number of blocks per query after the last step; None for no limit.

    Raises:
        InputError: the model of `apply` or of the Trainer is not converted.
        RuntimeError: a Trainer reaches an optimiser step whose loss lacks the budget loss.
    """

    def __init__(self, target: float, steps: int, *, start: float = 64.0, weight: float = 0.1, max_blocks: int | None = None) -> None:
        if target < MIN_MAX_BLOCKS:
            raise ValueError(f"target must be at least {MIN_MAX_BLOCKS}, the forced blocks, got {target}.")
        check_number("start", start, above=0)
        check_number("steps", steps, at_least=1)
        check_number("weight", weight, at_least=0)
        if max_blocks is not None and max_blocks < MIN_MAX_BLOCKS:
            raise ValueError(f"max_blocks must be at least {MIN_MAX_BLOCKS}, the number of forced blocks, got {max_blocks}.")
        if max_blocks is not None and max_blocks < target:
            raise ValueError(f"max_blocks must be at least target, {target}, got {max_blocks}.")
        self.target, self.steps, self.start, self.weight, self.max_blocks = target, steps, start, weight, max_blocks
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def opening(self, step: int, start: float = OPEN) -> float:
        """Value of opening at a step, which is added to base; `start` at step 0."""
        return start * (1 - self._share(step)) ** 3

    def target_at(self, step: int) -> float:
        """Target of the budget loss at a step, in blocks per query."""
        share = self._share(step)
        return float(self.start ** (1 - share) * self.target**share)

    def apply(self, model: nn.Module, step: int) -> None:
        """Sets a model's openings, target and weight for a step, counted from 0; from `steps` on, the final values."""
        if next(cores(model), None) is None:
            raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
        self._check(model)
        options: dict[str, Any] = {"budget_weight": self.weight}
        if self.max_blocks is not None and step >= self.steps:
            options["max_blocks"] = self.max_blocks
        for core in cores(model):
            core.opening.fill_(self.opening(step, core.start_opening))
            core.budget_target.fill_(self.target_at(step))
            for name, value in options.items():
                if getattr(core.options, name) != value:
                    setattr(core.options, name, value)
        if (converted := converted_model(model, DYN_NSA)) is not None:  # a model without a record has layers of the user's own
            recorded(converted.config)[DYN_NSA]["options"].update(options)

    def _check(self, model: nn.Module) -> None:
        """Once per model: warns of parts that are not trained or not saved, and makes an adapter save what the schedule changes."""
        if model in self._checked:
            return
        self._checked.add(model)
        found = list(cores(model))
        stay = sum(frozen((core.base, core.slope)) for core in found)
        if stay:
            warnings.warn(
                f"thresholds of {stay} of {len(found)} layers require no gradient, so training does not change them; "
                f"{remedy(model, PART)}.",
                stacklevel=3,
            )
        keep_in_adapter(model, PART)
        if self.max_blocks is not None and adapter_of(model) is not None and any(c.options.max_blocks != self.max_blocks for c in found):
            warnings.warn(
                f"max_blocks={self.max_blocks} is saved with the base model, not with an adapter; pass it to convert_attention, or save "
                "the base model again after training.",
                stacklevel=3,
            )

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None and next(cores(model), None) is not None:
            self._check(model)  # before a Trainer makes an optimiser or wraps the model

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)
        loss_was_taken(model)  # resets the flag for this step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        if self.weight > 0 and not loss_was_taken(model):
            raise RuntimeError(
                "the loss of this step does not include the budget loss. A model adds it only if it gets labels, and with "
                "label_smoothing_factor or compute_loss_func it gets none; add collected_budget_loss(model) in compute_loss_func."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)  # a checkpoint saved now, and the end of training, have the values of the next step

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, logs: Any = None, **kwargs: Any) -> None:
        assert model is not None
        found = {"key_blocks": mean_blocks(model, reset=True), "key_blocks_target": self.target_at(state.global_step)}
        if found["key_blocks"] == found["key_blocks"]:  # some were counted
            for log in (logs, *state.log_history[-1:]):
                log.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.steps:
            warnings.warn(
                f"training ended after {state.global_step} of the {self.steps} steps of BudgetSchedule, so the budget of {self.target} "
                "key blocks is not reached.",
                stacklevel=2,
            )

    def _share(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)
