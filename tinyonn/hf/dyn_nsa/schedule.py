"""The schedule that lowers the number of key blocks during training."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore
from ...nn.dyn_nsa_options import MAX_TEMPERATURE
from ...ops._checks import check_number, check_size
from ..peft_parts import adapter_of, frozen, keep_in_adapter, remedy
from .parts import PART, cores, loss_was_taken, set_options, take_counts

if TYPE_CHECKING:
    from transformers import Trainer

# Of a model that reads every block, at the first step that has counts: only shares below 0.03 % are left out. Far below it, a budget loss
# has no gradient either.
FIRST_PRICE = -8.0
GROWTH, MOST_GROWTH = 1.1, 5.0  # growth of the rate at each step on the same side of the path, and its limit
LEAST_FAR = 0.02  # blocks beyond the forced ones, in the logarithm that moves the price
PATH = 0.3  # of the steps: the target holds from there on
MISSED = 0.1  # relative error of the blocks read at the end, from which training ends with a warning
ROUNDED = 0.1  # of the mean of `base`: the rounding from which `base` is not centred
COOLING = 0.7  # of the steps: the temperature holds from there on
STAGES = 5  # of the temperature: a compiled model compiles again at each


class BudgetSchedule(TrainerCallback, ExportableState):
    """Lowers the key blocks that a converted model reads to a budget while it trains, and narrows the gates of its blocks. Use it as a
    Trainer's callback, or call `apply(model, step)` before each step of your own loop, and `apply(model, steps)` after the last one.

    The budget is one for the model: the mean over layers, heads, tokens and the ranks of torch.distributed. After each optimiser step the
    price moves by rate · log(blocks read / blocks wanted), both beyond the forced ones. Blocks wanted fall geometrically from those of the
    first step to `target` over the first 30 % of `steps`. The temperature falls geometrically, in five stages, over the first 70 %:
    a wide gate lets a training model learn where to look, a narrow one gives each block that is read its full weight. At each step `base`
    is centred over layers and heads, so that the price alone is the level. A Trainer logs the means of the training steps since its last
    log as `key_blocks` and, beyond the forced blocks, `key_blocks_far`; `key_blocks_target` is what is wanted, and `key_blocks_price` the
    price. Reporters such as TensorBoard get them after `before_reporters(trainer)`.

    Args:
        target: key blocks per query at the end, forced blocks included; at least as many as are forced.
        steps: optimiser steps of the training. If there are fewer, it ends with a warning.
        start: blocks wanted at the beginning; None for those that the first step reads, or 64 with a weight.
        rate: nats that the price moves in a step where the blocks read are e times those wanted, up to five times as many where they stay
            on one side of what is wanted; 0 to leave the number of blocks to a budget loss. With a rate or a weight, a price below -8 is
            set to -8 at the first step that has counts, because no block is near a lower one.
        weight: weight of the budget loss; 0 for none.
        distil_weight: weight of the distillation loss, which keeps the compressed branch's estimates of shares up to date while the model
            changes; 0 for none, None to leave that of the model. `distil_compression` trains them before training.
        distil_queries: random queries of each row and layer that this loss uses; None to leave those of the model, 16 at first.
        temperature: at the beginning and the end, in nats; None to leave it.
        max_blocks: largest number of blocks per query after the last step; None for no limit.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.
        InputError: the model of `apply` or of the Trainer is not converted, or has more forced blocks than the target or the start.
        RuntimeError: with a weight or a distil_weight, a Trainer reaches an optimiser step whose loss lacks that loss.
    """

    def __init__(
        self,
        target: float,
        steps: int,
        *,
        start: float | None = None,
        rate: float = 0.3,
        weight: float = 0.0,
        distil_weight: float | None = None,
        distil_queries: int | None = None,
        temperature: tuple[float, float] | None = (1.0, 0.1),
        max_blocks: int | None = None,
    ) -> None:
        check_number("target", target, at_least=1)
        check_size("steps", steps)
        check_number("rate", rate, at_least=0)
        check_number("weight", weight, at_least=0)
        if distil_weight is not None:
            check_number("distil_weight", distil_weight, at_least=0)
        if distil_queries is not None:
            check_size("distil_queries", distil_queries)
        if start is not None:
            check_number("start", start, above=0)
        if temperature is not None:
            if not isinstance(temperature, (tuple, list)) or len(temperature) != 2:
                raise ValueError(f"temperature must be two numbers, at the beginning and the end, got {temperature!r}.")
            for number in temperature:
                check_number("temperature", number, above=0, at_most=MAX_TEMPERATURE)
        if max_blocks is not None:
            check_size("max_blocks", max_blocks)
            if max_blocks < target:
                raise ValueError(f"max_blocks must be at least target, {target}, got {max_blocks}.")
        self.target, self.steps, self.rate, self.weight, self.max_blocks = target, steps, rate, weight, max_blocks
        self.temperature, self.distil_weight, self.distil_queries = temperature, distil_weight, distil_queries
        self.start = self._given_start = 64.0 if start is None and weight > 0 else start
        self._core: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the first of the model that is in training
        self._gap, self._growth = 0.0, 1.0
        self._unlogged = [0.0, 0.0, 0]  # sums over rows of the blocks read and of those not forced, and the rows, since the last log
        self._loaded: dict[str, Any] | None = None
        self._read: tuple[float, float] | None = None  # blocks per query that the last step read, and those not forced
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def target_at(self, step: int) -> float:
        """Blocks per query that are wanted at a step; `target` while the start is not known."""
        share = min(self._share(step) / PATH, 1.0)
        return float(self.target if self.start is None else self.start ** (1 - share) * self.target**share)

    def temperature_at(self, step: int) -> float | None:
        """Temperature at a step, in nats; None where it is left alone."""
        if self.temperature is None:
            return None
        first, last = self.temperature
        stage = math.floor(min(self._share(step) / COOLING, 1.0) * STAGES) / STAGES
        return float(first ** (1 - stage) * last**stage)

    @torch.no_grad()
    def apply(self, model: nn.Module, step: int) -> None:
        """Sets a model up for a step, counted from 0, after the forwards in training of the step before. Every rank must call it.

        The call after the last step, with `steps`, moves the price by what that step read, and sets `max_blocks`.
        """
        check_size("step", step, 0)
        if not isinstance(model, nn.Module) or next(cores(model), None) is None:
            raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
        self._check(model)
        found = list(cores(model))  # after the check, which may give an adapter copies of its own
        self._begin(found[0])
        price = self._centre(found)
        blocks, far, rows = take_counts(model)
        if rows:
            self._unlogged = [total + new for total, new in zip(self._unlogged, (blocks * rows, far * rows, rows), strict=True)]
        if self.start is None:
            self.start = blocks if rows else self._start_of(found[0], step)
        if step > 0:
            self._read = (blocks, far) if rows else None
            if rows and (self.rate or self.weight):
                wanted = self.target_at(step) - (blocks - far)
                price = max(price, FIRST_PRICE) + self._move(math.log(max(far, LEAST_FAR) / max(wanted, LEAST_FAR)))
        options: dict[str, Any] = {"budget_weight": self.weight}
        options["prices"] = ()  # those of an earlier calibration no longer hold
        given = {"distil_weight": self.distil_weight, "distil_queries": self.distil_queries}
        options |= {name: value for name, value in given.items() if value is not None}
        if (temperature := self.temperature_at(step)) is not None:
            options["temperature"] = temperature
        if self.max_blocks is not None and step >= self.steps:
            options["max_blocks"] = self.max_blocks
        for core in found:
            core.price.fill_(price)
            core.budget_target.fill_(self.target_at(step))
        set_options(model, **options)

    def _begin(self, core: DynNSACore) -> None:
        """Begins anew if another model than the last one is in training, whose first part this is."""
        if core not in self._core:
            self._core = weakref.WeakSet([core])
            self.start, self._gap, self._growth, self._read = self._given_start, 0.0, 1.0, None
            self._unlogged = [0.0, 0.0, 0]
            if self._loaded is not None:
                self.start, self._gap, self._growth = (self._loaded[name] for name in ("start", "gap", "growth"))
                self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """What a loop of your own saves beside the model to resume as if it had gone on; a Trainer does so by itself."""
        return {"start": self.start, "gap": self._gap, "growth": self._growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`, at the next `apply`.

        Raises:
            TypeError, ValueError: a key is missing, there is another, or a value is not a finite number.
        """
        if set(state) != {"start", "gap", "growth"}:
            raise ValueError(f"state must have the keys start, gap and growth, got {', '.join(map(str, state)) or 'none'}.")
        for name, value in state.items():
            if name != "start" or value is not None:
                check_number(f"{name} of the state", value)
        self._core, self._loaded = weakref.WeakSet(), dict(state)

    def _move(self, gap: float) -> float:
        """Change of the price: by more the longer the gap has been on one side, as where no block's importance is near the price."""
        self._growth = min(self._growth * GROWTH, MOST_GROWTH) if gap * self._gap > 0 else 1.0
        self._gap = gap
        return self.rate * self._growth * gap

    @staticmethod
    def _centre(found: list[DynNSACore]) -> float:
        """Moves the mean of `base` over layers and heads into the price, and leaves the thresholds as they are.

        A mean so small that the precision of `base` would round it away stays in `base`. If the price took it, every call would move the
        thresholds.

        Returns:
            The price.
        """
        bases: list[Any] = [core.base.detach() for core in found]
        whole = [base.full_tensor() if isinstance(base, DTensor) else base for base in bases]  # fully_shard splits parameters
        mean, worst, centred = float(torch.cat([base.float().cpu() for base in whole]).mean()), 0.0, []
        for core, base in zip(found, whole, strict=True):
            wide = base.to(torch.promote_types(base.dtype, torch.float32))
            part = (core.price_part(core.price + mean) - core.price_part(core.price)).to(wide)
            centred.append((wide - part).to(base.dtype))
            worst = max(worst, float((wide - part - centred[-1]).abs().max()))
        if worst > ROUNDED * abs(mean):
            return float(found[0].price)
        for core, moved in zip(found, centred, strict=True):
            base = core.base
            if isinstance(base, DTensor):
                moved = distribute_tensor(moved, base.device_mesh, base.placements, src_data_rank=None)
            base.copy_(moved)
        return float(found[0].price) + mean

    def _start_of(self, core: DynNSACore, step: int) -> float | None:
        """Start of the path on which a resumed training left off, from the target that was saved; None at the first step."""
        share = self._share(step) / PATH
        if step == 0 or share >= 1:
            return None
        return float((float(core.budget_target) / self.target**share) ** (1 / (1 - share)))

    def _check(self, model: nn.Module) -> None:
        """Once per model: warns of parts that are not trained or not saved, and makes an adapter save what the schedule changes."""
        if model in self._checked:
            return
        found = list(cores(model))
        forced = max(core.options.forced for core in found)
        if self.target < forced:
            raise InputError(f"target of BudgetSchedule must be at least {forced}, the forced blocks, got {self.target}.")
        if self._given_start is not None and self._given_start < forced:
            raise InputError(f"start of BudgetSchedule must be at least {forced}, the forced blocks, got {self._given_start}.")
        if self.distil_weight and not all(core.estimate_parameters() for core in found):
            raise InputError(
                "distil_weight of BudgetSchedule must be 0 for a model without learnable_compression or compress_query, got "
                f"{self.distil_weight}."
            )
        self._checked.add(model)
        stay = sum(frozen((core.base, core.slope)) for core in found)
        if stay and self.weight > 0:
            warnings.warn(
                f"thresholds of {stay} of {len(found)} layers require no gradient, so the budget loss does not change them; "
                f"{remedy(model, PART)}.",
                stacklevel=3,
            )
        stay = sum(frozen(core.estimate_parameters().values()) for core in found)
        if stay and self.distil_weight:
            warnings.warn(
                f"compressed keys of {stay} of {len(found)} layers require no gradient, so the distillation loss does not change them; "
                f"{remedy(model, PART)}.",
                stacklevel=3,
            )
        keep_in_adapter(model, PART)
        last = {"temperature": self.temperature_at(self.steps), "max_blocks": self.max_blocks}
        lost = [
            f"{name}={value}"
            for name, value in last.items()
            if value is not None and any(getattr(core.options, name) != value for core in found)
        ]
        if lost and adapter_of(model) is not None:
            are, them = ("is", "it") if len(lost) == 1 else ("are", "them")
            warnings.warn(
                f"{', '.join(lost)} {are} saved with the base model, not with an adapter; pass {them} to convert_attention, or save the "
                "base model again after training.",
                stacklevel=3,
            )

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None and next(cores(model), None) is not None:
            self._check(model)  # before a Trainer makes an optimiser or wraps the model

    def state(self) -> dict[str, Any]:
        """What a Trainer saves with a checkpoint."""
        names = ("target", "steps", "rate", "weight", "distil_weight", "distil_queries", "temperature", "max_blocks")
        args = {"start": self._given_start, **{name: getattr(self, name) for name in names}}
        return {"args": args, "attributes": {"_gap": self._gap, "_growth": self._growth}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        first = None if model is None else next(cores(model), None)
        if first is not None and isinstance(saved, dict) and state.global_step > 0:  # a training that resumes
            self._begin(first)
            self._gap, self._growth = saved["attributes"]["_gap"], saved["attributes"]["_growth"]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)
        loss_was_taken(model)  # resets the flag for this step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        if (self.weight > 0 or next(cores(model)).options.distil_weight > 0) and not loss_was_taken(model):
            name = "budget loss" if self.weight > 0 else "distillation loss"
            raise RuntimeError(
                f"the loss of this step does not include the {name}. A model adds it only if it gets labels, and with "
                "label_smoothing_factor or compute_loss_func it gets none; add collected_budget_loss(model) in compute_loss_func."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.apply(model, state.global_step)  # a checkpoint saved now, and the end of training, have the values of the next step

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, logs: Any = None, **kwargs: Any) -> None:
        assert model is not None
        blocks, far, rows = self._unlogged
        if not rows or any(name.startswith("eval_") for name in logs):
            return
        self._unlogged = [0.0, 0.0, 0]
        found = {"key_blocks": blocks / rows, "key_blocks_far": far / rows, "key_blocks_target": self.target_at(state.global_step)}
        found["key_blocks_price"] = float(next(cores(model)).price)
        for log in (logs, *state.log_history[-1:]):
            log.update(found)

    def before_reporters(self, trainer: Trainer) -> None:
        """Moves this callback of a Trainer before all others. A Trainer runs its reporters first, so they log without what this one adds.

        Raises:
            ValueError: the Trainer does not have this callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            raise ValueError("trainer must have this callback; pass it in callbacks=[...] or to add_callback.")
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.steps:
            missed = f"the budget of {self.target} key blocks" if self._share(state.global_step) < PATH else "the last temperature"
            warnings.warn(
                f"training ended after {state.global_step} of the {self.steps} steps of BudgetSchedule, so {missed} is not reached.",
                stacklevel=2,
            )
        elif self._read is not None:
            blocks, far = self._read
            if blocks > (1 + MISSED) * self.target or (far == 0 and blocks < (1 - MISSED) * self.target):
                what = "no block beyond the forced ones" if far == 0 else "more than the price could leave out in these steps"
                warnings.warn(
                    f"training ended at {blocks:.2f} key blocks per query, {what}, and the budget of BudgetSchedule is {self.target}; call "
                    "calibrate before the training, or give it more steps.",
                    stacklevel=2,
                )

    def _share(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)
