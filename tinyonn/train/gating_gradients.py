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
from torch import Tensor, distributed, nn

from ..nn.dyn_moe import DynMoE, Visit
from ..ops import Routing

if TYPE_CHECKING:
    from torch.amp import GradScaler

KEEP_OTHER_GRADIENTS = ("DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def mixtures(model: nn.Module) -> dict[str, DynMoE]:
    """The DynMoE layers of a model by name; TypeError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, DynMoE)}
    if not found:
        raise TypeError(f"model must hold a tinyonn.nn.DynMoE, got {type(model).__name__} without one.")
    return found


def check_options(weight: float, w_ce: float, w_kl: float, temperature: float, *, name: str = "weight") -> None:
    for option, value in ((name, weight), ("w_ce", w_ce), ("w_kl", w_kl)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} must be at least 0 and finite, got {value}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}.")


def check_gradients_are_plain(model: nn.Module) -> None:
    """TypeError where `.grad` of the routers' parameters is not what an optimiser reads."""
    for module in model.modules():
        if type(module).__name__ in KEEP_OTHER_GRADIENTS:
            raise TypeError(
                f"model must run alone or under DistributedDataParallel, got {type(module).__name__}, whose gradients are not those of "
                "its routers' parameters."
            )
    for name, mixture in mixtures(model).items():
        if any(hasattr(parameter, "device_mesh") for parameter in mixture.router.parameters()):
            raise TypeError(
                f"{name}.router must have whole parameters, got sharded ones: leave routers out of fully_shard (ignored_params)."
            )


def data_parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper of a model, compiled or not; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)), None)


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
        self._losses: list[Tensor] = []
        self._grads: dict[nn.Parameter, Tensor] = {}

    def _await(self, module: DynMoE, inputs: Any, output: Tensor | None) -> None:
        """Forward hook of a mixture, called after errors too: a recomputed forward is left by one as soon as it has what it needs."""
        if not module.visits:
            return
        visit = module.visits.pop()
        if output is not None:
            self._check_mask(output)
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
        parameters = [parameter for parameter in module.router.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            loss = module.gating_loss(visit, mask, **self._options)
            self._losses.append(loss.detach())
            if not parameters:
                return
            share = loss * self._weight
            grads = torch.autograd.grad(share if self._scaler is None else self._scaler.scale(share), parameters, materialize_grads=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            self._grads[parameter] = self._grads[parameter] + grad if parameter in self._grads else grad

    def _mask_on(self, device: torch.device) -> Tensor | None:
        """Brought to a device once: each copy from the host would be waited for."""
        if self._token_mask is not None and device not in self._masks:
            self._masks[device] = self._token_mask.to(device)
        return self._masks.get(device)

    def _check_mask(self, output: Tensor) -> None:
        mask, lead = self._token_mask, output.shape[:-1]
        if mask is None or mask.shape == lead:
            return
        # Rows that were flattened on one side only are in the same order; (4, 5) for (5, 4) are not.
        if mask.numel() != lead.numel() or min(mask.dim(), len(lead)) != 1:
            raise ValueError(f"token_mask must have the shape of the tokens a mixture is given, {tuple(lead)}, got {tuple(mask.shape)}.")

    def _finish(self) -> None:
        wrapper = data_parallel(self._model)
        if self._losses:
            self.loss = torch.stack([loss.to(self._losses[0].device) for loss in self._losses]).mean()
        grads = {parameter: grad / len(self._losses) for parameter, grad in self._grads.items()}
        # Without synchronisation gradients stay this process' own, and are averaged with the main loss' at the step's last batch.
        if wrapper is not None and wrapper.require_backward_grad_sync:
            grads = self._averaged(grads, wrapper.process_group)
        for parameter, grad in grads.items():
            # Never in place: the old tensor may be a view of DistributedDataParallel's bucket, or the caller's.
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def _averaged(self, grads: dict[nn.Parameter, Tensor], group: Any) -> dict[nn.Parameter, Tensor]:
        """Over all processes, of all routers: a mixture that took no part here may have taken part elsewhere."""
        routers = [p for mixture in mixtures(self._model).values() for p in mixture.router.parameters() if p.requires_grad]
        if not routers:
            return {}
        given = [grads.get(parameter, torch.zeros_like(parameter)).flatten() for parameter in routers]
        flat = torch.cat(given)
        distributed.all_reduce(flat, group=group)
        flat /= distributed.get_world_size(group)
        parts = flat.split([parameter.numel() for parameter in routers])
        return {parameter: part.view_as(parameter).to(parameter.dtype) for parameter, part in zip(routers, parts, strict=True)}


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

    The mean over layers and calls is taken. Under DistributedDataParallel it is averaged over processes as the other gradients are, and
    left alone within `no_sync`. Where the block ends with an error nothing is added.

    Args:
        model: with at least one `nn.DynMoE`; the wrapper, where there is one.
        token_mask: bool or integers, of the leading shape of what the layers are given, which tokens count, such as an attention mask;
            None for all.
        weight: of the routers' losses, at least 0; divide it by the number of accumulated batches.
        w_ce, w_kl, temperature: see `ops.surprise_min_loss`.
        scaler: AMP's, with whose scale these gradients are multiplied like the others. The surprise needs no unscaling: the loss divides
            it by its mean.

    Raises:
        TypeError: no DynMoE in the model; a wrapper other than DistributedDataParallel, or sharded routers; a mask of floats.
        ValueError: an option out of range; in forward, a mask of another shape than the tokens.
        RuntimeError: a mixture is captured already; in backward, a second pass through one call.
    """
    check_options(weight, w_ce, w_kl, temperature)
    check_gradients_are_plain(model)
    if token_mask is not None and (not isinstance(token_mask, Tensor) or token_mask.is_floating_point()):
        given = token_mask.dtype if isinstance(token_mask, Tensor) else type(token_mask).__name__
        raise TypeError(f"token_mask must be a tensor of bool or integers, got {given}.")
    found = GatingGradients(model, token_mask, weight, scaler, {"w_ce": w_ce, "w_kl": w_kl, "temperature": temperature})
    with ExitStack() as stack:
        for module in stack.enter_context(capture(model)):
            handle = module.register_forward_hook(found._await, always_call=True)
            stack.callback(handle.remove)
        yield found
    found._finish()
