"""Gradients of the routers' losses, computed while the backward of the main loss passes each mixture.

When backward has filled the probe of a call, the router's scores are computed again from the call's detached inputs, and their loss is
differentiated at once. No graph is kept, and the inputs are freed where an ordinary backward frees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._debug import debug, debug_enabled
from ..nn._surrounding import held
from ..nn.expert_statistics import check_mask_shape, check_token_mask
from ..nn.routed import Routed
from ..nn.surprise_capture import Visit, call_listener, captured_calls
from ..nn.surprise_loss import SurpriseLoss, surprise_loss_of
from ..ops import Routing
from ..ops._checks import check_number
from .mixtures import Mixtures, routed_layers
from .parallel import average, average_thresholds

if TYPE_CHECKING:
    from torch.amp import GradScaler


def capture(model: nn.Module) -> AbstractContextManager[dict[Routed, list[Visit]]]:
    """The calls of each layer with routed experts within the block, with inputs and routing, for losses of your own.

    It adds no gradients, so the model may have any wrapper.

    Raises:
        TypeError: the model contains no `nn.DynMoE` or `nn.DynSMHA`.
        RuntimeError: a layer is captured already.
    """
    return captured_calls(routed_layers(model).values(), "router_inputs")


class GatingGradients:
    """Result of `gating_gradients`.

    Attributes:
        loss: 0-d, the mean of the routers' losses over layers and calls, without `weight`, detached; 0 if backward reached no mixture.
    """

    def __init__(
        self, mixtures: Mixtures, token_mask: Tensor | None, weight: float, scaler: GradScaler | None, surprise_loss: SurpriseLoss
    ) -> None:
        self.loss = torch.zeros(())
        self._mixtures, self._token_mask, self._weight, self._scaler = mixtures, token_mask, weight, scaler
        self._surprise_loss = surprise_loss
        self._masks: dict[torch.device, Tensor] = {}
        self._losses: list[tuple[Routed, Tensor]] = []
        self._grads: dict[tuple[Routed, str], Tensor] = {}

    def _wait(self, module: Routed, visit: Visit) -> None:
        """Listener to a call: the router learns from it when backward has filled its probe."""
        if self._token_mask is not None:
            check_mask_shape(self._token_mask, visit.shape)
        # The hook must not reference the probe, which references the hook. A recomputed call has two graphs; this list is freed with the
        # graph that is dropped.
        kept = [(visit.hidden_states, visit.routing.top_k_index, visit.surprise_budget, visit.shape)]
        visit.probe.register_post_accumulate_grad_hook(lambda probe: self._learn(module, kept, probe))

    def _learn(self, module: Routed, kept: list[Any], probe: Tensor) -> None:
        if not kept:
            raise RuntimeError("backward ran twice through the same forward; surprise is defined for one.")
        hidden_states, index, budget, shape = kept.pop()
        none = hidden_states.new_empty(0)
        visit = Visit(hidden_states, Routing(index, none, none, none), probe, budget, shape)
        mask = self._mask_on(hidden_states.device)
        parameters = {name: parameter for name, parameter in module.router.named_parameters() if parameter.requires_grad}
        if any(hasattr(parameter, "device_mesh") for parameter in parameters.values()):
            raise RuntimeError(
                "a router is sharded during backward; apply fully_shard to the mixture or to a module above it, not to its router."
            )
        # debug() would not know the mixture's name here; `_check_losses` does.
        with torch.enable_grad(), debug(False):
            loss = module.gating_loss(visit, mask, surprise_loss=self._surprise_loss)
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
        """The mask, copied to each device once: a copy from the host waits for the device."""
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
        parameters = [one for layer in _teachable(self._mixtures) for one in layer.router.parameters() if one.requires_grad]
        for parameter, grad in average(self._mixtures, grads, parameters).items():
            # Not in place: the old tensor may be a view of DistributedDataParallel's bucket, or belong to the caller.
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad

        average_thresholds(self._mixtures)

    def _check_losses(self) -> None:
        names = {module: name for name, module in self._mixtures.layers.items()}
        for module, loss in self._losses:
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"the gating loss of {names[module]!r} must be finite, got {loss.item()}: its tokens, its router or the gradient of "
                    "its output are not finite."
                )


@contextmanager
def gating_gradients(
    model: nn.Module,
    *,
    token_mask: Tensor | None = None,
    weight: float = 1.0,
    surprise_loss: SurpriseLoss | Mapping[str, Any] | None = None,
    scaler: GradScaler | None = None,
    w_ce: float | None = None,
    w_kl: float | None = None,
    temperature: float | None = None,
) -> Iterator[GatingGradients]:
    """Trains routers by the forward and backward within the block: at its end, gradients of their losses are added to their `.grad`.

        with gating_gradients(model, token_mask=batch["attention_mask"], weight=0.1) as gating:
            model(**batch).loss.backward()
        optimizer.step()

    The loss is the mean over layers and calls. Under DistributedDataParallel and `fully_shard` its gradients are averaged over processes
    like the others, and are not averaged within `no_sync`. If the block ends with an error, nothing is added.

    Args:
        model: a model with at least one `nn.DynMoE` or `nn.DynSMHA`; the wrapper, if it has one.
        token_mask: bool or integers, of the leading shape of the layers' inputs; which tokens count, such as an attention mask. None for
            all. The statistics of the layers count the same tokens.
        weight: weight of the routers' losses, at least 0; divide it by the number of accumulated batches.
        surprise_loss: weights of the loss on surprise, a `SurpriseLoss` or a mapping of its numbers; None for its defaults.
        scaler: AMP's scaler; these gradients are multiplied by its scale like the others. The surprise needs no unscaling, because the
            loss divides it by its mean.
        w_ce, w_kl, temperature: the numbers of `SurpriseLoss`, in place of `surprise_loss`; None for its defaults.

    Raises:
        TypeError: the model has no such layer, another wrapper, or routers that are sharded apart from the rest; a mask of floats; an
            option that is not a number.
        ValueError: an option out of range; in forward, a mask of another shape than the tokens; at the end, under `tinyonn.debug()` and
            without a scaler, a gating loss that is not finite, with the mixture's name.
        RuntimeError: a mixture is captured already; in backward, a second pass through the same forward.
    """
    check_number("weight", weight, at_least=0)
    weighted = surprise_loss_of(surprise_loss, w_ce=w_ce, w_kl=w_kl, temperature=temperature)
    with train_routers(Mixtures(model), token_mask, weight, scaler, weighted) as found:
        yield found


def _teachable(mixtures: Mixtures) -> list[Routed]:
    """Layers whose router has a loss of its own, the same on all processes."""
    return [layer for layer in mixtures.layers.values() if layer.gating_loss_kind != "none"]


@contextmanager
def train_routers(
    mixtures: Mixtures, token_mask: Tensor | None, weight: float, scaler: GradScaler | None, surprise_loss: SurpriseLoss
) -> Iterator[GatingGradients]:
    """`gating_gradients` for a model whose mixtures are found already."""
    layers = mixtures.layers.values()
    found = GatingGradients(mixtures, token_mask, weight, scaler, surprise_loss)
    with ExitStack() as stack:
        if teachable := _teachable(mixtures):
            stack.enter_context(call_listener(teachable, "router_inputs", found._wait))
        if token_mask is not None:
            check_token_mask(token_mask)
            stack.enter_context(held((layer.surrounding_mask, token_mask) for layer in layers))
        yield found
    found._finish()
