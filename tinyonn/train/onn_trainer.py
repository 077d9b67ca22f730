"""A transformers Trainer whose model watches its own predictive integrity, and whose experts are born and recycled."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames

from ..nn.dyn_nsa import DynNSACore
from ..nn.dyn_smha import DynSMHA
from ..nn.expert_pools import expert_pools
from ..nn.expert_rows import own_part
from ..nn.routed import Routed
from ..nn.surprise_loss import SurpriseLoss
from ..ops._checks import check_flag, check_number, check_size
from .captured_surprise import CapturedSurprise
from .hyper_step import HyperStepMixin
from .integrity import output_entropy, predictive_integrity
from .lazy_adamw import LazyAdamW
from .lifecycle import ExpertLifecycle, LifeEvent
from .perpetual import PerpetualMixin

ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)  # what `LazyAdamW` takes the place of


class OnnTrainer(PerpetualMixin, HyperStepMixin, Trainer):
    """`transformers.Trainer` with `HyperStep`'s training of routers, an `ExpertLifecycle`, and predictive integrity (PI) in its log.

    Each line of the log has, as means over the steps since the last one: `pi`, its two terms `pi_accuracy` and `pi_complexity`,
    `free_energy` (their sum), `tau` (mean entropy of the output, in nats), `surprise` (mean of a token's experts, of its own loss),
    `routing_accuracy` (share of the tokens with several experts whose best-scored one had the least surprise), `gating_loss`, and of all
    layers together `experts_per_token`, `heads_per_token`, `blocks_per_query`, `far_blocks_per_query`, `unserved` (share of the window's
    tokens that passed no expert's threshold), `live_experts`, `births`, `recyclings` and `skipped_steps`. What the model does not have is
    left out.

    A step whose gradients are not finite is skipped: the optimiser leaves weights and its own state as they are. After `max_bad_steps` in a
    row training stops. This look at the gradients waits for the device once a step. Checkpoints have the state of the lifecycle, so that a
    resumed run goes on with it; `config.has_life` is set, so that `from_pretrained` of a TinyOnn model restores the life of its experts.

    With `store`, checkpoints go to a `tinyonn.store.PerpetualStore`, which writes what changed; see `PerpetualMixin`.

    Accelerate, DistributedDataParallel and FSDP2 work as with every Trainer. The means in the log are those of the first process.

    Args:
        args, others: see `transformers.Trainer`.
        alpha, gamma: see `predictive_integrity`; None for those of the model's configuration, or 1 and 0.5.
        pruning_threshold, growth_threshold: see `ExpertLifecycle`; None for those of the model's configuration, or none. Without an expert
            that is not live, no expert is born.
        w_ce, w_kl: weights of the routers' loss on surprise, for layers with such a loss; None for those of the model's configuration, or
            0. Where both are 0, no router learns from surprise.
        drive_weights: whether w_ce and w_kl are multiplied by the regeneration rate.
        max_bad_steps: skipped steps in a row after which training stops, at least 1.
        freeze_idle: whether the optimiser is a `LazyAdamW`, which does not move experts without a gradient. None for yes where it can be:
            where the trainer makes the optimiser itself and `args.optim` is adamw_torch or adamw_torch_fused, transformers' default.

    Attributes:
        lifecycle: the `ExpertLifecycle`; None before the first step.
        events: births and recyclings since this object was made, the same on all processes.
        skipped: steps skipped so far.
        stopped: why training stopped before its end; None if it did not.

    Raises:
        TypeError, ValueError: an option is out of range; freeze_idle is True where it can't be; at the first step, what `ExpertLifecycle`
            raises.
    """

    def __init__(
        self,
        *args: Any,
        alpha: float | None = None,
        gamma: float | None = None,
        pruning_threshold: float | None = None,
        growth_threshold: float | None = None,
        w_ce: float | None = None,
        w_kl: float | None = None,
        drive_weights: bool = False,
        max_bad_steps: int = 10,
        freeze_idle: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_size("max_bad_steps", max_bad_steps)
        check_flag("drive_weights", drive_weights)
        if freeze_idle is not None:
            check_flag("freeze_idle", freeze_idle)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if freeze_idle and (reason := self._no_lazy_optimizer()):
            raise ValueError(f"freeze_idle must be False or None {reason}, got True.")
        self._freeze_idle = freeze_idle is not False

        def number(name: str, given: float | None, default: float) -> float:
            config = getattr(trainer.model, "config", None)
            return float(getattr(config, name, default) if given is None else given)

        self.alpha, self.gamma, self.max_bad_steps = number("alpha", alpha, 1.0), number("gamma", gamma, 0.5), max_bad_steps
        check_number("alpha", self.alpha, at_least=0)
        check_number("gamma", self.gamma, at_least=0, at_most=1)
        self._thresholds = _thresholds(trainer.model, pruning_threshold, growth_threshold)
        w_ce, w_kl = number("w_ce", w_ce, 0.0), number("w_kl", w_kl, 0.0)
        self._weights = SurpriseLoss(w_ce=w_ce, w_kl=w_kl) if w_ce or w_kl else None
        self._drive_weights = drive_weights
        self.surprise_loss = self._weights
        if self._weights is None:
            self.gating_weight = 0.0
        self.lifecycle: ExpertLifecycle | None = None
        self.events: list[LifeEvent] = []
        self.skipped, self._in_a_row = 0, 0
        self.stopped: str | None = None
        self._life_state: dict[str, Any] | None = None
        self._batch: dict[str, Tensor] = {}  # sums over the accumulated batches of a step
        self._means: dict[str, tuple[Tensor, int]] = {}  # sums over the steps since the last line of the log, and their number
        self._counted = {"births": 0, "recyclings": 0, "skipped_steps": 0}
        self._entropy: Tensor | None = None
        for layer in _layers(trainer.model):  # before a checkpoint is loaded, which has their buffers
            layer.track_life()
        if hasattr(trainer.model, "config"):
            trainer.model.config.has_life = True
        trainer.add_callback(_Steps(self))

    def score(self) -> float | None:
        """The smoothed PI, by which a store keeps the best steps."""
        return None if self.lifecycle is None else self.lifecycle.integrity

    # ---- the optimiser ----

    def _no_lazy_optimizer(self) -> str | None:
        """Why the optimiser can't be a `LazyAdamW`; None if it can."""
        trainer: Any = self
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
            return "with an optimizer of your own"
        if trainer.args.optim not in ADAMW:
            return f"with optim={OptimizerNames(trainer.args.optim).value!r}, which is not adamw_torch or adamw_torch_fused"
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainer: Any = self
        whole = trainer.model if model is None else model
        pools = expert_pools(whole) if self._freeze_idle and self._no_lazy_optimizer() is None else []
        if not pools:
            return super().create_optimizer(model)
        _, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, whole)
        trainer.optimizer_cls_and_kwargs = LazyAdamW, options | {"pools": pools}
        try:
            return super().create_optimizer(model)
        finally:
            trainer.optimizer_cls_and_kwargs = None  # parameters may be others the next time

    # ---- a batch ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = self
        if self.lifecycle is None:
            self._begin_life(model)
        assert self.lifecycle is not None
        scaler = getattr(trainer.accelerator, "scaler", None)
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        scale = 1.0 if scaler is None else scaler.get_scale()
        number = self._tokens_of_mean(inputs, args[0] if args else kwargs.get("num_items_in_batch"))
        with self.lifecycle.recording(scaler) as surprise:
            loss = super().training_step(model, inputs, *args, **kwargs)
        with torch.no_grad():
            self._add(loss, surprise, number / scale, _predicted(inputs).to(loss.device))
        return loss

    def _tokens_of_mean(self, inputs: dict[str, Any], number: Tensor | int | None) -> Tensor | float:
        """What turns the gradient of this batch's loss into that of a token's own: the tokens that the loss is a mean over, as Trainer has
        it. It multiplies the loss by the number of processes where tokens are counted over all of them.
        """
        trainer: Any = self
        by_number = number is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)
        if not by_number:
            return _predicted(inputs) * float(trainer.current_gradient_accumulation_steps)
        assert number is not None
        over_all = trainer.args.average_tokens_across_devices
        return number / (trainer.accelerator.num_processes if over_all else 1)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[1] if len(outputs) > 1 else None
            self._entropy = None if logits is None else _mean_entropy(logits, inputs.get("labels"))
        return (loss, outputs) if return_outputs else loss

    def _begin_life(self, model: nn.Module) -> None:
        trainer: Any = self
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        switches = {"w_ce": self._drive_weights, "w_kl": self._drive_weights}
        self.lifecycle = ExpertLifecycle(model, optimizer, **self._thresholds, **switches, seed=trainer.args.seed)  # type: ignore[arg-type]
        if self._life_state is not None:
            self.lifecycle.load_state_dict(self._life_state)

    def _add(self, loss: Tensor, surprise: CapturedSurprise, number: Tensor | float, tokens: Tensor) -> None:
        """Adds a batch to the sums of its step; `number` turns its surprises into those of the tokens' own losses. Means of batches are
        weighted by the tokens that they predict.
        """
        batch = {"loss": loss.double(), "tokens": tokens.double()}
        mean, accuracy = surprise.mean(), surprise.first_choice_accuracy()
        found = {"tau": self._entropy, "surprise": None if mean is None else mean * number, "routing_accuracy": accuracy}
        for name, value in found.items():
            if value is not None:
                batch[name] = torch.where(tokens > 0, value.double().to(loss.device) * tokens, 0)
        for name, value in batch.items():
            self._batch[name] = self._batch[name] + value if name in self._batch else value

    # ---- a step ----

    def _end_step(self, bad: bool) -> None:
        assert self.lifecycle is not None
        batch, self._batch = self._batch, {}
        integrity = None
        if batch and not bad:
            tokens = batch["tokens"].clamp(min=1)
            means = {name: value / tokens for name, value in batch.items() if name not in ("loss", "tokens")} | {"loss": batch["loss"]}
            zero = torch.zeros_like(means["loss"])
            pi = predictive_integrity(
                means["loss"], means.get("tau", zero), means.get("surprise", zero), alpha=self.alpha, gamma=self.gamma
            )  # fmt: skip
            integrity = pi.integrity
            terms = {"pi": pi.integrity, "pi_accuracy": pi.accuracy, "pi_complexity": pi.complexity}
            terms["free_energy"] = pi.accuracy + pi.complexity
            for name in ("loss", "tau", "surprise", "routing_accuracy"):
                if name in means:
                    terms[name] = means[name]
            if self._weights is not None and self.last_gating_loss is not None:
                terms["gating_loss"] = self.last_gating_loss.detach()
            for name, value in terms.items():
                total, number = self._means.get(name, (torch.zeros_like(value, dtype=torch.float64), 0))
                self._means[name] = total + value.double(), number + 1
        events = self.lifecycle.step(integrity)
        self.events += events
        for event in events:
            self._counted["births" if event.kind == "birth" else "recyclings"] += 1
            if self.store is not None:
                fields = event._asdict()
                self.store.record(fields.pop("kind"), fields.pop("step"), **fields)
        if self._weights is not None:
            self.surprise_loss = self.lifecycle.surprise_loss(self._weights)

    def _skip(self, model: nn.Module) -> bool:
        """Drops gradients that are not finite, on all processes alike, and counts them."""
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        trainer: Any = self
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():  # an overflow is the scaler's to skip; a loss is not
            loss = self._batch.get("loss", torch.zeros(()))
            bad = not bool(trainer.accelerator.reduce(loss.clone(), reduction="sum").isfinite())
        else:
            norms = torch._foreach_norm([own_part(grad) for grad in grads]) if grads else ()
            finite = torch.stack([norm.isfinite() for norm in norms]).all() if norms else torch.ones((), dtype=torch.bool)
            bad = bool(trainer.accelerator.reduce((~finite).float().to(trainer.args.device), reduction="sum") > 0)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad:
            model.zero_grad(set_to_none=True)
            self.skipped += 1
            self._counted["skipped_steps"] += 1
        return bad

    # ---- the log ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            found = self.life_metrics()
            own = found.pop("loss", math.nan)
            if found["skipped_steps"]:  # Trainer puts other steps' losses, or 0, in the place of those that are not finite
                logs["loss"] = own
            logs |= found
        super().log(logs, *args, **kwargs)

    def life_metrics(self) -> dict[str, float]:
        """Means since the last call, by name; waits for the device."""
        trainer: Any = self
        found: dict[str, float] = {name: float(total) / number for name, (total, number) in self._means.items()}
        self._means.clear()
        found |= self._counted
        self._counted = dict.fromkeys(self._counted, 0)
        pools: dict[str, list[float]] = defaultdict(list)
        for layer in _layers(trainer.model):
            pools["heads_per_token" if isinstance(layer, DynSMHA) else "experts_per_token"].append(layer.statistics()["mean_k"])
            pools["live_experts"].append(float(layer.router.expert_mask.sum()))
            if layer.life is not None and (share := layer.life.unserved_share()) is not None:
                pools["unserved"].append(share)
            layer.reset_statistics()
        for module in trainer.model.modules():
            if isinstance(module, DynNSACore):
                seen = module.statistics()
                pools["blocks_per_query"].append(seen["mean_count"])
                pools["far_blocks_per_query"].append(seen["far_count"])
                module.reset_statistics()
        found |= {name: sum(values) if name == "live_experts" else sum(values) / len(values) for name, values in pools.items()}
        return {name: value for name, value in found.items() if not (isinstance(value, float) and math.isnan(value))}


class _Steps(TrainerCallback, ExportableState):
    """Looks at gradients before the optimiser, ends the lifecycle's step after it, and has its state in the trainer's."""

    def __init__(self, trainer: OnnTrainer) -> None:
        self._trainer = trainer
        self._bad = False

    def state(self) -> dict[str, Any]:
        trainer = self._trainer
        kept = {"lifecycle": None if trainer.lifecycle is None else trainer.lifecycle.state_dict()}
        return {"args": {}, "attributes": kept | {"skipped": trainer.skipped, "in_a_row": trainer._in_a_row}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        kept = state.stateful_callbacks.get(type(self).__name__)
        found = (kept or {}).get("attributes", {})
        if not found.get("lifecycle"):
            warnings.warn("the checkpoint has no state of the experts' life, which begins again.", stacklevel=2)
            return
        trainer = self._trainer
        trainer._life_state = found["lifecycle"]
        trainer.skipped, trainer._in_a_row = found["skipped"], found["in_a_row"]
        if trainer.lifecycle is not None:
            trainer.lifecycle.load_state_dict(found["lifecycle"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self._bad = self._trainer._skip(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        trainer._end_step(self._bad)
        if self._bad and trainer._in_a_row >= trainer.max_bad_steps:
            trainer.stopped = f"{trainer._in_a_row} steps in a row had a loss or gradients that were not finite"
            control.should_training_stop = True
        return control


def _thresholds(model: Any, pruning_threshold: float | None, growth_threshold: float | None) -> dict[str, float | None]:
    """Thresholds of the lifecycle; a given growth_threshold is kept, so that the lifecycle refuses it where no expert can be born."""
    room = any(not bool(layer.router.expert_mask.all()) for layer in _layers(model))
    config = getattr(model, "config", None)
    if pruning_threshold is None:
        pruning_threshold = getattr(config, "pruning_threshold", None)
    if growth_threshold is None and room:
        growth_threshold = getattr(config, "growth_threshold", None)
    return {"pruning_threshold": pruning_threshold, "growth_threshold": growth_threshold}


def _layers(model: nn.Module) -> list[Routed]:
    return [module for module in model.modules() if isinstance(module, Routed)]


def _predicted(inputs: dict[str, Any]) -> Tensor:
    """Number of tokens that a batch predicts, 0-d; 1 without labels."""
    labels = inputs.get("labels")
    return torch.ones((), dtype=torch.int64) if labels is None else (labels[..., 1:] != -100).sum()


@torch.no_grad()
def _mean_entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Mean entropy of the output where a token is predicted, 0-d."""
    entropy = output_entropy(logits.detach())
    if labels is None or labels.shape != entropy.shape:
        return entropy.mean()
    kept = labels[..., 1:] != -100
    return torch.where(kept, entropy[..., :-1], 0).sum() / kept.sum().clamp(min=1)
