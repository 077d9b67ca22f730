"""One training step for the whole model: the backward of the main loss computes the surprise that trains the routers.

loss.backward()                     fills the probes, one tensor of zeros per mixture and call
router.grad += ∂ gating             from scores computed again on detached inputs, while backward passes a mixture; keeps no graph
optimizer.step()
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._debug import debug_enabled
from ..errors import listed
from ..nn.dead_experts import warn_of_dead_experts
from ..nn.surprise_loss import SurpriseLoss, surprise_loss_of
from ..ops._checks import check_number, check_size
from .gating import train_routers
from .mixtures import Mixtures, mixtures_of

if TYPE_CHECKING:
    from torch.amp import GradScaler


EVERY = 100  # batches from one look for dead experts to the next, which waits for the device


class HyperStepResult(NamedTuple):
    """Result of a step.

    Attributes:
        loss: 0-d, the main loss, detached.
        gating_loss: 0-d, mean loss of the routers.
        stepped: whether this was the last of the accumulated batches, after which the optimisers run. A scaler may skip them.
    """

    loss: Tensor
    gating_loss: Tensor
    stepped: bool


class HyperStep:
    """A training step for a model with `nn.DynMoE` or `nn.DynSMHA` layers.

        step = HyperStep(model, optimizer)
        for batch in batches:
            result = step(lambda: model(**batch).loss, token_mask=batch["attention_mask"])

    Under DistributedDataParallel pass the wrapped model; gradients are synchronised in the last of the accumulated batches. Under
    `fully_shard`, over a mesh of one dimension, they are synchronised in each. If an epoch ends in the middle of an accumulation, the next
    batch continues it; `reset` drops it.

    Every 100 batches the counts of the mixtures are read. A warning names, once, mixtures whose live experts got none of the last
    1,000 · E / target_k tokens or more.

    The attributes `model`, `gating_weight`, `surprise_loss`, `accumulation_steps` and `max_grad_norm` may be assigned between steps. Each
    step checks them. An assigned model's parameters must be in the optimisers, which no step checks.

    Args:
        model: a model with at least one such layer. Modules may be added or replaced between steps.
        optimizer: optimiser of all parameters, or of all but the routers'.
        router_optimizer: optimiser of the routers' parameters; None if `optimizer` has them.
        gating_weight: weight of the routers' losses relative to the main loss, at least 0.
        surprise_loss: weights of the loss on surprise, a `SurpriseLoss` or a mapping of its numbers; None for its defaults.
        accumulation_steps: batches per step of the optimisers.
        max_grad_norm: maximum norm of the gradients of all optimisers together; None for no clipping.
        scaler: AMP's scaler, for float16. With `max_grad_norm` an overflow anywhere skips the step of both optimisers; without it each
            optimiser skips its own step, as usual in torch.
        w_ce, w_kl, temperature: the numbers of `SurpriseLoss`, in place of `surprise_loss`; None for its defaults.

    Raises:
        TypeError: the model contains no such layer, or a wrapper other than DistributedDataParallel and `fully_shard`; an optimiser is
            missing or needs a closure (LBFGS); an option has the wrong type.
        ValueError: a router's parameter is in no optimiser, or in both; an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        router_optimizer: Optimizer | None = None,
        *,
        gating_weight: float = 1.0,
        surprise_loss: SurpriseLoss | Mapping[str, Any] | None = None,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        scaler: GradScaler | None = None,
        w_ce: float | None = None,
        w_kl: float | None = None,
        temperature: float | None = None,
    ) -> None:
        self.surprise_loss: SurpriseLoss | Mapping[str, Any] | None = surprise_loss_of(
            surprise_loss, w_ce=w_ce, w_kl=w_kl, temperature=temperature
        )
        self.gating_weight, self.accumulation_steps, self.max_grad_norm = gating_weight, accumulation_steps, max_grad_norm
        self._check_options()
        self._mixtures = Mixtures(model)
        _warn_if_frozen(self._mixtures)
        given = gating_weight != 1 or any(option is not None for option in (surprise_loss, w_ce, w_kl, temperature))
        if given and all(layer.gating_loss_kind == "none" for layer in self._mixtures.layers.values()):
            warnings.warn(
                "no router has a loss of its own, so gating_weight and surprise_loss have no effect; make the mixtures with "
                "gating_loss='surprise'.",
                stacklevel=2,
            )
        self.model, self.scaler = model, scaler
        self.optimizers = [optimizer] if router_optimizer is None else [optimizer, router_optimizer]
        for one in self.optimizers:
            _check_optimizer(one)
        self._batches = self._calls = 0
        owners = Counter(map(id, self._parameters()))
        for name, parameter in self._mixtures.router_parameters().items():
            if parameter.requires_grad and owners[id(parameter)] != 1:
                raise ValueError(f"{name} must be in one optimiser, got {owners[id(parameter)]}.")

    def __call__(self, compute_loss: Callable[[], Tensor], token_mask: Tensor | None = None) -> HyperStepResult:
        """Runs forward and backward of one batch, and the optimisers after the last of the accumulated batches.

        Args:
            compute_loss: function that runs the model on one batch and returns the main loss, 0-d.
            token_mask: bool or integers, of the shape of the batch's tokens; which tokens the routers learn from and the statistics
                count, such as an attention mask. None for all.

        Raises:
            TypeError, ValueError: the constructor would refuse a model or an option that was assigned; compute_loss does not return a 0-d
                tensor with a graph; the mask does not fit; under `tinyonn.debug()` a loss, a router's loss or a gradient is not finite,
                with the name of the mixture or the parameters (gradients that a scaler scales may overflow and are not checked). After
                any error, also of compute_loss and the optimisers, accumulated gradients are dropped and the next call starts a new
                accumulation. Steps that an optimiser has made are kept.
        """
        try:
            self._check_options()
            surprise_loss = surprise_loss_of(self.surprise_loss)
            last = self._batches + 1 >= self.accumulation_steps
            self._find_mixtures()
            wrapper = self._mixtures.wrapper
            with ExitStack() as stack:
                if not last and wrapper is not None:
                    stack.enter_context(wrapper.no_sync())
                weight = self.gating_weight / self.accumulation_steps
                gating = stack.enter_context(train_routers(self._mixtures, token_mask, weight, self.scaler, surprise_loss))
                loss = _checked(compute_loss())
                share = loss / self.accumulation_steps
                (share if self.scaler is None else self.scaler.scale(share)).backward()
            if debug_enabled() and self.scaler is None:
                _check_gradients(self.model)
            self._batches += 1
            if last:
                self._step()
        except BaseException:
            self.reset()
            raise
        self._calls += 1
        if self._calls % EVERY == 0:
            warn_of_dead_experts(self._mixtures.layers)
        return HyperStepResult(loss.detach(), gating.loss, last)

    def reset(self) -> None:
        """Drops the gradients of batches accumulated since the last step."""
        self._batches = 0
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _check_options(self) -> None:
        check_number("gating_weight", self.gating_weight, at_least=0)
        check_size("accumulation_steps", self.accumulation_steps)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, above=0)

    def _find_mixtures(self) -> None:
        mixtures = mixtures_of(self.model, self._mixtures)
        if mixtures is not self._mixtures:
            self._mixtures = mixtures
            _warn_if_frozen(mixtures, stacklevel=4)

    def _step(self) -> None:
        if self.scaler is None:
            self._clip()
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            try:
                if self.max_grad_norm is not None:
                    for optimizer in self.optimizers:
                        self.scaler.unscale_(optimizer)
                # If the gradients of one optimiser overflow, clipping would set those of the other to zero or NaN.
                if bool(self._clip().isfinite()):
                    for optimizer in self.optimizers:
                        self.scaler.step(optimizer)
            except BaseException:
                # Otherwise the scaler would treat the optimisers as unscaled or stepped in the next step. It raises if it did neither.
                with suppress(AssertionError):
                    self.scaler.update()
                raise
            self.scaler.update()
        self.reset()

    def _clip(self) -> Tensor:
        if self.max_grad_norm is None:
            return torch.zeros(())
        return nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for optimizer in self.optimizers for group in optimizer.param_groups for parameter in group["params"]]


def _warn_if_frozen(mixtures: Mixtures, stacklevel: int = 3) -> None:
    if not any(parameter.requires_grad for parameter in mixtures.router_parameters().values()):
        warnings.warn(
            "no router requires a gradient, so none learns: call requires_grad_(True) on their parameters; under PEFT set "
            "modules_to_save=['router'] in its configuration, or a name of the mixtures.",
            stacklevel=stacklevel,
        )


def _check_optimizer(optimizer: Any) -> None:
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"optimizer must step without a closure, got {type(optimizer).__name__}.")


def _check_gradients(model: nn.Module) -> None:
    found = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if found:
        raise ValueError(f"gradients must be finite, got NaN or infinity in {listed(found, 5, width=80)}.")


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"compute_loss must return a tensor, got {type(loss).__name__}.")
    if loss.dim():
        raise ValueError(f"compute_loss must return one number, a 0-d tensor, got shape {tuple(loss.shape)}.")
    if not loss.requires_grad:
        raise ValueError("compute_loss must return a loss with a graph; this one is detached or was computed under no_grad.")
    if debug_enabled() and not bool(loss.isfinite()):
        raise ValueError(f"compute_loss must return a finite loss, got {loss.item()}.")
    return loss


class HyperStepMixin:
    """Mixin for `transformers.Trainer` that adds the routers' losses to every training step.

        class SurpriseTrainer(HyperStepMixin, Trainer):
            gating_weight = 0.1

    If the inputs have an `attention_mask`, (batch, tokens), routers learn only from unmasked tokens. Supported are one process,
    DistributedDataParallel and `fully_shard`; DeepSpeed, FullyShardedDataParallel and DataParallel raise an error.

    Attributes:
        gating_weight: weight of the routers' losses relative to the main loss.
        surprise_loss: weights of the loss on surprise, a `SurpriseLoss` or a mapping of its numbers; None for its defaults.
        gating_options: earlier name of `surprise_loss`; {} if not set. TypeError if both are set.
        last_gating_loss: mean loss of the routers in the last step.
    """

    gating_weight: float = 1.0
    surprise_loss: SurpriseLoss | Mapping[str, Any] | None = None
    gating_options: dict[str, float] | SurpriseLoss | None = {}  # noqa: RUF012  # a class's choice, never written to
    last_gating_loss: Tensor | None = None
    _mixtures: Mixtures | None = None
    _calls: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(HyperStepMixin)]
        others = [kind for kind in before if not issubclass(kind, HyperStepMixin) and "training_step" in vars(kind)]
        if others:
            raise TypeError(f"HyperStepMixin must stand before {others[0].__name__} in the bases of {cls.__name__}.")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = self
        first = self._mixtures is None
        self._mixtures = mixtures_of(model, self._mixtures)
        if first:
            _warn_if_frozen(self._mixtures)
        surprise_loss = self._surprise_loss()
        check_number("gating_weight", self.gating_weight, at_least=0)
        weight = self.gating_weight / trainer.current_gradient_accumulation_steps
        scaler = getattr(trainer.accelerator, "scaler", None)
        with train_routers(self._mixtures, inputs.get("attention_mask"), weight, scaler, surprise_loss) as gating:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.last_gating_loss = gating.loss
        self._calls += 1
        if self._calls % EVERY == 0:
            warn_of_dead_experts(self._mixtures.layers)
        return loss

    def _surprise_loss(self) -> SurpriseLoss:
        earlier = self.gating_options
        if self.surprise_loss is None:
            return surprise_loss_of(earlier, name="gating_options")
        if earlier is not None and earlier != {}:
            raise TypeError("gating_options is the earlier name of surprise_loss; set surprise_loss only.")
        return surprise_loss_of(self.surprise_loss)
