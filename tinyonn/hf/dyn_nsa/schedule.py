"""From all blocks to a budget, over the steps of a training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...nn.dyn_nsa import MIN_MAX_BLOCKS, OPEN
from .parts import cores, loss_was_taken
from .saving import DynNSAConversion


class BudgetSchedule(TrainerCallback):
    """Takes a converted model from all blocks to a budget; a Trainer's callback, or called by hand before each step.

    Over `steps` optimiser steps, with s the share of them done: opening goes as (1 - s)³ from where conversion set it, -30 as a rule, to
    0, where the learnt thresholds alone decide; the budget loss's target goes from `start` to `target` geometrically.

    Args:
        target: key blocks per query, forced ones included, at the end.
        steps: optimiser steps until then.
        start: the loss's target at the beginning.
        weight: of the budget loss, from the first step on.
        max_blocks: most blocks of a query from the end on; None for no limit.

    Raises:
        RuntimeError: under Trainer, before an optimiser step to whose loss the budget loss was not added.
    """

    def __init__(self, target: float, steps: int, *, start: float = 64.0, weight: float = 0.1, max_blocks: int | None = None) -> None:
        if target <= 0 or start <= 0:
            raise ValueError(f"target and start must be positive, got {target} and {start}.")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        if weight < 0:
            raise ValueError(f"weight must be at least 0, got {weight}.")
        if max_blocks is not None and max_blocks < MIN_MAX_BLOCKS:
            raise ValueError(f"max_blocks must be at least {MIN_MAX_BLOCKS}, the forced ones, got {max_blocks}.")
        self.target, self.steps, self.start, self.weight, self.max_blocks = target, steps, start, weight, max_blocks

    def opening(self, step: int, start: float = OPEN) -> float:
        """Added to base at a step; `start` at step 0."""
        return start * (1 - self._share(step)) ** 3

    def target_at(self, step: int) -> float:
        """Blocks per query that the loss pulls towards at a step."""
        share = self._share(step)
        return float(self.start ** (1 - share) * self.target**share)

    def apply(self, model: nn.Module, step: int) -> None:
        """Sets a model to the step that is about to be taken, counted from 0."""
        options: dict[str, Any] = {"budget_weight": self.weight}
        if self.max_blocks is not None and step >= self.steps:
            options["max_blocks"] = self.max_blocks
        for core in cores(model):
            core.opening.fill_(self.opening(step, core.start_opening))
            core.budget_target.fill_(self.target_at(step))
            for name, value in options.items():
                if getattr(core.options, name) != value:
                    setattr(core.options, name, value)
        for module in model.modules():
            conversion = getattr(getattr(module, "config", None), "quantization_config", None)
            if isinstance(conversion, DynNSAConversion):
                conversion.options.update(options)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)
        loss_was_taken(model)  # none yet of this step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        if self.weight > 0 and not loss_was_taken(model):
            raise RuntimeError(
                "the budget loss must enter the loss of every step, got a step without it: a model that is given no labels, as with "
                "label_smoothing_factor or compute_loss_func, adds none; add collected_budget_loss(model) in compute_loss_func."
            )

    def _share(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)
