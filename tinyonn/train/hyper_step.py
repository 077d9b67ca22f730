"""One step for the whole model: the main loss' backward leaves the surprise behind, and from it the routers learn.

loss.backward()                     fills the probes, one zero tensor a mixture and call
gating = Σ router losses            from scores computed again on detached inputs: the first graph is gone by then
router.grad += ∂ gating             beside what the main loss left there
optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..nn.dyn_moe import DynMoE, Visit

if TYPE_CHECKING:
    from torch.amp import GradScaler


def mixtures(model: nn.Module) -> dict[str, DynMoE]:
    """The DynMoE layers of a model by name; TypeError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, DynMoE)}
    if not found:
        raise TypeError(f"model must hold a tinyonn.nn.DynMoE, got {type(model).__name__} without one.")
    return found


@contextmanager
def capture(model: nn.Module) -> Iterator[dict[DynMoE, list[Visit]]]:
    """Within it every call of every DynMoE layer is remembered, for `gating_gradients` after backward."""
    with ExitStack() as stack:
        yield {module: stack.enter_context(module.capturing()) for module in mixtures(model).values()}


def gating_gradients(
    visits: dict[DynMoE, list[Visit]],
    *,
    token_mask: Tensor | None = None,
    weight: float = 1.0,
    w_ce: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    grad_scale: float = 1.0,
) -> Tensor:
    """Adds the gradients of the routers' losses to `.grad` of their parameters; averaged over processes where there are several.

    Calls whose probe has no gradient are left out: checkpointing runs a layer twice, and the graph belongs to one of both.

    Args:
        visits: of `capture`, after the backward of the main loss.
        token_mask: of the leading shape of what the layers were given, which tokens count, such as an attention mask.
        weight: of the routers' losses; divide it by the number of accumulated batches.
        w_ce, w_kl, temperature: see `ops.surprise_min_loss`.
        grad_scale: AMP's loss scale, with which these gradients are multiplied like the others. The surprise needs no unscaling: the
            loss divides it by its mean.

    Returns:
        0-d, the mean of the routers' losses over layers and calls, unweighed, detached; 0 where nothing was captured.
    """
    losses = []
    found = [(module, visit) for module, calls in visits.items() for visit in calls if visit.probe.grad is not None]
    for module, visit in found:
        loss = module.gating_loss(visit, token_mask, w_ce=w_ce, w_kl=w_kl, temperature=temperature)
        parameters = [parameter for parameter in module.router.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(loss * (weight * grad_scale / len(found)), parameters, materialize_grads=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            _average(grad)
            # Never in place: the old tensor may be a view of DistributedDataParallel's bucket, or the caller's.
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        losses.append(loss.detach())
    if not losses:
        return torch.zeros(())
    return torch.stack(losses).mean()


def _average(grad: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(grad)
        grad.div_(distributed.get_world_size())


class HyperStepResult(NamedTuple):
    """What a step gives.

    Attributes:
        loss: 0-d, the main loss, detached.
        gating_loss: 0-d, mean loss of the routers.
        stepped: whether the optimisers ran: not between accumulated batches.
    """

    loss: Tensor
    gating_loss: Tensor
    stepped: bool


class HyperStep:
    """A training step for a model with DynMoE layers.

        step = HyperStep(model, optimizer)
        for batch in batches:
            result = step(lambda: model(**batch).loss, token_mask=batch["attention_mask"])

    Under DistributedDataParallel give it the wrapped model; between accumulated batches gradients are not synchronised.

    Args:
        model: with at least one `nn.DynMoE`.
        optimizer: of all parameters, or of all but the routers'.
        router_optimizer: of the routers' parameters; None where `optimizer` has them.
        gating_weight: of the routers' losses beside the main loss.
        w_ce, w_kl, temperature: see `ops.surprise_min_loss`.
        accumulation_steps: batches a step of the optimisers.
        max_grad_norm: gradients of the whole model are clipped to it; None for no clipping.
        scaler: AMP's, for float16.

    Raises:
        TypeError: no DynMoE in the model.
        ValueError: a router's parameter is in no optimiser, or in both.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        router_optimizer: Optimizer | None = None,
        *,
        gating_weight: float = 1.0,
        w_ce: float = 1.0,
        w_kl: float = 1.0,
        temperature: float = 1.0,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
        self.model, self.scaler = model, scaler
        self.optimizers = [optimizer] if router_optimizer is None else [optimizer, router_optimizer]
        self.gating_weight, self.options = gating_weight, {"w_ce": w_ce, "w_kl": w_kl, "temperature": temperature}
        self.accumulation_steps, self.max_grad_norm = accumulation_steps, max_grad_norm
        self._batches = 0
        owners = [id(p) for one in self.optimizers for group in one.param_groups for p in group["params"]]
        for name, module in mixtures(model).items():
            for inner, parameter in module.router.named_parameters():
                if parameter.requires_grad and owners.count(id(parameter)) != 1:
                    raise ValueError(f"{name}.router.{inner} must be in one optimiser, got {owners.count(id(parameter))}.")

    def __call__(self, compute_loss: Callable[[], Tensor], token_mask: Tensor | None = None) -> HyperStepResult:
        """
        Args:
            compute_loss: runs the model on one batch and gives the main loss, 0-d.
            token_mask: of the shape of the batch's tokens, which of them the routers learn from; None for all.
        """
        last = (self._batches + 1) % self.accumulation_steps == 0
        with ExitStack() as stack:
            visits = stack.enter_context(capture(self.model))
            if not last and isinstance(self.model, nn.parallel.DistributedDataParallel):
                stack.enter_context(self.model.no_sync())
            loss = compute_loss()
            share = loss / self.accumulation_steps
            (share if self.scaler is None else self.scaler.scale(share)).backward()
            gating = gating_gradients(
                visits, token_mask=token_mask, weight=self.gating_weight / self.accumulation_steps,
                grad_scale=1.0 if self.scaler is None else self.scaler.get_scale(), **self.options,
            )  # fmt: skip
        self._batches += 1
        if last:
            self._step()
        return HyperStepResult(loss.detach(), gating, last)

    def _step(self) -> None:
        if self.max_grad_norm is not None:
            if self.scaler is not None:
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class HyperStepMixin:
    """For `transformers.Trainer`: adds the routers' losses to every training step.

        class SurpriseTrainer(HyperStepMixin, Trainer):
            gating_weight = 0.1

    Attributes:
        gating_weight: of the routers' losses beside the main loss.
        gating_options: w_ce, w_kl, temperature of `ops.surprise_min_loss`.
        last_gating_loss: of the last step.
    """

    gating_weight: float = 1.0
    gating_options: dict[str, float] = {}  # noqa: RUF012  # a class's choice, never written to
    last_gating_loss: Tensor | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = self
        mask = inputs.get("attention_mask")
        with capture(model) as visits:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
            scaler = getattr(trainer.accelerator, "scaler", None)
            self.last_gating_loss = gating_gradients(
                visits, token_mask=None if mask is None else mask.to(loss.device),
                weight=self.gating_weight / trainer.accelerator.gradient_accumulation_steps,
                grad_scale=1.0 if scaler is None else scaler.get_scale(), **self.gating_options,
            )  # fmt: skip
        return loss
