"""Gradients of the routers' losses, made while the backward of the main loss passes each mixture.

When backward has filled the probe of a call, its router's scores are computed once more on the call's inputs, detached, and the loss on
them is differentiated at once. So no graph is kept, and the inputs are let go of where an ordinary backward lets go of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._debug import debug, debug_enabled
from ..nn._options import check_is_number
from ..nn.dyn_moe import DynMoE, Visit
from ..nn.expert_statistics import check_mask_shape, check_token_mask, token_mask_of
from ..ops import Routing
from .parallel import average, check_wrapper

if TYPE_CHECKING:
    from torch.amp import GradScaler


def mixtures(model: nn.Module) -> dict[str, DynMoE]:
    """The DynMoE layers of a model by name; TypeError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, DynMoE)}
    if not found:
        raise TypeError(f"model must hold a tinyonn.nn.DynMoE, whose router there is to teach, got {type(model).__name__} without one.")
    return found


def check_options(weight: float, w_ce: float, w_kl: float, temperature: float, *, name: str = "weight") -> None:
    for option, value in ((name, weight), ("w_ce", w_ce), ("w_kl", w_kl), ("temperature", temperature)):
        check_is_number(option, value)
    for option, value in ((name, weight), ("w_ce", w_ce), ("w_kl", w_kl)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} must be at least 0 and finite, got {value}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}.")


def check_model(model: nn.Module) -> None:
    """TypeError where the model has no mixture, or a wrapper under which its routers cannot learn."""
    check_wrapper(model, {f"{name}.router".lstrip("."): mixture.router for name, mixture in mixtures(model).items()})


@contextmanager
def capture(model: nn.Module) -> Iterator[dict[DynMoE, list[Visit]]]:
    """Within it every call of every DynMoE layer is remembered with its inputs and its routing, for losses of your own."""
    with ExitStack() as stack:
        yield {module: stack.enter_context(module.capturing()) for module in mixtures(model).values()}


class GatingGradients:
    """What `gating_gradients` gives.

    Attributes:
        loss: 0-d, the mean of the routers' losses over layers and calls, unweighed, detached; 0 where no backward passed a mixture.
    """

    def __init__(self, model: nn.Module, token_mask: Tensor | None, weight: float, scaler: GradScaler | None, options: dict[str, float]):
        self.loss = torch.zeros(())
        self._model, self._token_mask, self._weight, self._scaler, self._options = model, token_mask, weight, scaler, options
        self._masks: dict[torch.device, Tensor] = {}
        self._losses: list[tuple[DynMoE, Tensor]] = []
        self._grads: dict[tuple[DynMoE, str], Tensor] = {}

    def _await(self, module: DynMoE, inputs: Any, output: Tensor | None) -> None:
        """Forward hook of a mixture, called after errors too: a recomputed forward is left by one as soon as it has what it needs."""
        if not module.visits:
            return
        visit = module.visits.pop()
        if output is not None and self._token_mask is not None:
            check_mask_shape(self._token_mask, output.shape[:-1])
        # The hook must not hold the probe, which holds the hook. A call that is recomputed has two graphs, and of the one that is thrown
        # away this goes too.
        kept = [(visit.hidden_states, visit.routing.top_k_index, visit.surprise_budget)]
        visit.probe.register_post_accumulate_grad_hook(lambda probe: self._learn(module, kept, probe))

    def _learn(self, module: DynMoE, kept: list[Any], probe: Tensor) -> None:
        if not kept:
            raise RuntimeError("a mixture's surprise must come from one backward pass, got a second through the same call.")
        hidden_states, index, budget = kept.pop()
        none = hidden_states.new_empty(0)
        visit = Visit(hidden_states, Routing(index, none, none, none), probe, budget)
        mask = self._mask_on(hidden_states.device)
        parameters = {name: parameter for name, parameter in module.router.named_parameters() if parameter.requires_grad}
        if any(hasattr(parameter, "device_mesh") for parameter in parameters.values()):
            raise RuntimeError(
                "routers must be whole while backward passes them: apply fully_shard to the mixture or above, not to its router."
            )
        # What debug finds in here has no name yet: `_finish` has.
        with torch.enable_grad(), debug(False):
            loss = module.gating_loss(visit, mask, **self._options)
            self._losses.append((module, loss.detach()))
            if not parameters:
                return
            share = loss * self._weight
            scaled = share if self._scaler is None else self._scaler.scale(share)
            grads = torch.autograd.grad(scaled, tuple(parameters.values()), materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            place = (module, name)
            self._grads[place] = self._grads[place] + grad if place in self._grads else grad

    def _mask_on(self, device: torch.device) -> Tensor | None:
        """Brought to a device once: each copy from the host would be waited for."""
        if self._token_mask is not None and device not in self._masks:
            self._masks[device] = self._token_mask.to(device)
        return self._masks.get(device)

    def _finish(self) -> None:
        losses = [loss for _, loss in self._losses]
        if debug_enabled() and self._scaler is None:
            self._check_losses()
        if losses:
            self.loss = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
        grads = {module.router.get_parameter(name): grad / len(self._losses) for (module, name), grad in self._grads.items()}
        routers = [mixture.router for mixture in mixtures(self._model).values()]
        parameters = [parameter for router in routers for parameter in router.parameters() if parameter.requires_grad]
        for parameter, grad in average(self._model, grads, parameters).items():
            # Never in place: the old tensor may be a view of DistributedDataParallel's bucket, or the caller's.
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def _check_losses(self) -> None:
        names = {module: name for name, module in mixtures(self._model).items()}
        for module, loss in self._losses:
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"the gating loss of {names[module]!r} must be finite, got {loss.item()}: its tokens, its router or the gradient of "
                    "its output are not."
                )


@contextmanager
def gating_gradients(
    model: nn.Module,
    *,
    token_mask: Tensor | None = None,
    weight: float = 1.0,
    w_ce: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    scaler: GradScaler | None = None,
) -> Iterator[GatingGradients]:
    """Forward and backward within it teach the routers: at its end their losses' gradients are added to `.grad` of their parameters.

        with gating_gradients(model, token_mask=batch["attention_mask"], weight=0.1) as gating:
            model(**batch).loss.backward()
        optimizer.step()

    The mean over layers and calls is taken. Under DistributedDataParallel and `fully_shard` it is averaged over processes as the other
    gradients are, and left alone within `no_sync`. Where the block ends with an error nothing is added.

    Args:
        model: with at least one `nn.DynMoE`; the wrapper, where there is one.
        token_mask: bool or integers, of the leading shape of what the layers are given, which tokens count, such as an attention mask;
            None for all. The statistics of the layers count the same tokens.
        weight: of the routers' losses, at least 0; divide it by the number of accumulated batches.
        w_ce, w_kl, temperature: see `ops.surprise_min_loss`.
        scaler: AMP's, with whose scale these gradients are multiplied like the others. The surprise needs no unscaling: the loss divides
            it by its mean.

    Raises:
        TypeError: no DynMoE in the model; another wrapper than both, or routers that are sharded apart from the rest; a mask of floats; an
            option that is no number.
        ValueError: an option out of range; in forward, a mask of another shape than the tokens; at the end, under `tinyonn.debug()` and
            without a scaler, a gating loss that is not finite, by the mixture's name.
        RuntimeError: a mixture is captured already; in backward, a second pass through one call.
    """
    check_options(weight, w_ce, w_kl, temperature)
    check_model(model)
    if token_mask is not None:
        check_token_mask(token_mask)
    found = GatingGradients(model, token_mask, weight, scaler, {"w_ce": w_ce, "w_kl": w_kl, "temperature": temperature})
    with ExitStack() as stack:
        for module in stack.enter_context(capture(model)):
            handle = module.register_forward_hook(found._await, always_call=True)
            stack.callback(handle.remove)
        if token_mask is not None:
            stack.enter_context(token_mask_of(model, token_mask))
        yield found
    found._finish()
