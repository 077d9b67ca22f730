"""Routers of a converted model from a sample of text.

N tokens, F features, E experts

The contribution of an expert to a token is the norm of its output, ‖o‖; all experts run on a sample to measure it. Prototypes are the
directions that best predict it, by ridge regression on the directions of the tokens. With its threshold, an expert gets as many tokens as
count it among their k largest contributions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..._io.units import counted
from ...errors import InputError
from ...nn import DynMoE, ThresholdRouter
from ...nn._search import bisect
from ...nn.threshold_router import cosines, mean_experts
from ...ops._dispatch import autocast_off
from ...ops.experts._activations import activate
from ...ops.experts._tuples import Layout
from .._converted import converted_model, recorded
from ..interfaces import gradients_kept, modes_kept
from ..peft_parts import active, active_modules, adapter_of, keep_in_adapter, running_statistics
from .options import DynMoEOptions
from .saving import DYN_MOE

OPEN = -2.0  # threshold below every cosine
RIDGE = 0.3  # relative to the mean variance of a feature; a sample has few tokens per feature


def mixtures(model: nn.Module) -> dict[str, DynMoE]:
    """The mixtures of a model by name; under PEFT, the active ones."""
    return {name: module for name, module in active_modules(model).items() if isinstance(module, DynMoE)}


def router_of(module: DynMoE) -> ThresholdRouter:
    """The active router, also if PEFT has wrapped it."""
    router: ThresholdRouter = active(module.router)
    return router


def expert_statistics(model: nn.Module, *, reset: bool = False) -> dict[str, dict[str, Any]]:
    """Running statistics of each mixture by name; see `DynMoE.statistics`.

    Args:
        reset: whether to reset the statistics afterwards.
    """
    return running_statistics(model, DynMoE, reset)


@torch.no_grad()
def calibrate_experts(
    model: PreTrainedModel,
    sample: Tensor,
    target_k: float,
    *,
    min_experts: int = 1,
    max_experts: int | None = None,
    shift: bool = False,
) -> dict[str, float]:
    """Sets the thresholds of a converted model so that a token goes to `target_k` experts of a layer on average.

    The sample runs once. Layers are calibrated from first to last, each on the output of the already sparse layers below it. Experts that
    `expert_mask` excludes are not counted. After an error every layer is as it was before.

    Args:
        model: model that `convert_mlp_to_dynmoe` has converted.
        sample: (B, T) token ids without padding, run in one batch; a few thousand tokens are enough.
        target_k: mean number of experts per token, between min_experts and max_experts.
        min_experts, max_experts: bounds of the number of experts per token; None for all. If both equal target_k, routing is a plain top-k.
        shift: whether all thresholds of a layer move by the same amount, which keeps what they learned. Otherwise each threshold is set
            anew, so that an expert gets as many tokens as have it among their `target_k` largest contributions.

    Returns:
        Mean number of experts per token over the sample, by name of the layer.

    Raises:
        InputError: the model is not converted, or routes by budget; the sample does not reach a layer, or its values there are not finite.
        ValueError: a target or bound is out of range; the sample has another shape or type, ids outside the vocabulary, or too few tokens
            for each expert to get one.
    """
    converted = converted_model(model, DYN_MOE) if isinstance(model, nn.Module) else None
    if converted is None:
        raise InputError(f"model must be converted by convert_mlp_to_dynmoe, got an unconverted {type(model).__name__}.")
    conversion = recorded(converted.config)[DYN_MOE]
    options = DynMoEOptions(**conversion["options"])
    if options.routing != "threshold":
        raise InputError(f"routing must be 'threshold' to calibrate a model, got {options.routing!r}; choose a budget instead.")
    bounds: dict[str, Any] = {
        "target_k": target_k,
        "min_experts": min_experts,
        "max_experts": options.num_experts if max_experts is None else max_experts,
    }
    replace(options, **bounds)  # checks them before a layer is changed
    check_sample(model, sample)
    if any(conversion["options"][key] != value for key, value in bounds.items()) and adapter_of(model) is not None:
        warnings.warn(
            f"{', '.join(bounds)} are saved with the base model, not with an adapter; save the base model again, or calibrate it before "
            "get_peft_model.",
            stacklevel=2,
        )
    layers = mixtures(model)
    for name, module in layers.items():
        live = int(router_of(module).expert_mask.sum())
        if target_k > live:
            raise ValueError(f"target_k must be at most {live}, the live experts of {name}, got {target_k}.")
        if sample.numel() < (needed := math.ceil(live / target_k)):  # an expert would get no token
            raise ValueError(
                f"sample is too short for target_k={target_k} of {live} experts: it has {counted(sample.numel(), 'token')}, and needs at "
                f"least {needed:,}, better a few thousand."
            )
    keep_in_adapter(model, "router")
    reached = {}

    def set_layer(name: str, module: Any, x: Tensor) -> None:
        for key, value in bounds.items():
            setattr(router_of(module), key, value)
        if not shift:
            fit_thresholds(router_of(module), x, contributions(name, module, x))
        reached[name] = shift_thresholds(router_of(module), x)

    with _put_back_after_an_error(layers.values(), tuple(bounds)):
        run_sample(model, sample, dict(layers), set_layer)
    conversion["options"] |= bounds
    for module in layers.values():
        module.reset_statistics()
    return reached


@contextmanager
def _put_back_after_an_error(modules: Iterable[DynMoE], options: tuple[str, ...]) -> Iterator[None]:
    routers: list[tuple[ThresholdRouter, dict[str, Any]]] = []
    tensors: list[tuple[Tensor, Tensor]] = []
    for module in modules:
        router = router_of(module)
        routers.append((router, {key: getattr(router, key) for key in options}))
        tensors.extend((tensor, tensor.clone()) for tensor in (router.thresholds, module.expert_counts, module.tokens_seen))
    try:
        yield
    except BaseException:
        for router, values in routers:
            vars(router).update(values)
        for tensor, old in tensors:
            tensor.copy_(old)
        raise


def check_sample(model: PreTrainedModel, sample: Tensor) -> None:
    if not isinstance(sample, Tensor) or sample.dim() != 2 or sample.dtype not in (torch.int32, torch.int64):
        found = f"{sample.dtype} {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
        raise ValueError(f"sample must be token ids of shape (B, T), got {found}.")
    if sample.numel() < 2:
        raise ValueError(f"sample is too short: it has {counted(sample.numel(), 'token')}, and needs at least 2, better a few thousand.")
    known = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    outside = sample[(sample < 0) | (sample >= known)]
    if len(outside):  # on a GPU an index out of range ends the process' work there
        raise ValueError(f"sample must be token ids of shape (B, T), 0 … {known - 1}, got {outside[0].item()}.")


def run_sample(model: PreTrainedModel, sample: Tensor, layers: dict[str, nn.Module], act: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Runs the model without its head, in eval mode. Before each layer runs, calls `act` with its name, the layer and its input, (N, F).

    The caller's autocast applies to the model, not to `act`.

    Raises:
        InputError: an input is not finite, or the sample did not reach a layer.
    """
    missed = set(layers)
    with ExitStack() as stack:
        for name, layer in layers.items():

            def before(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                check_finite(f"inputs of {name}", x)
                with torch.no_grad(), autocast_off(x):
                    act(name, module, x)
                missed.discard(name)

            stack.callback(layer.register_forward_pre_hook(before).remove)
        with modes_kept(model), gradients_kept(model):
            model.eval()
            model.base_model(sample.to(model.device), use_cache=False)
    if missed:
        first = next(name for name in layers if name in missed)
        raise InputError(f"the sample did not reach {first}, which must run in every forward.")


def check_finite(what: str, x: Tensor) -> None:
    if bad := int((~x.isfinite()).any(-1).sum()):
        raise InputError(f"{what} contain NaN or infinity in {bad} of {len(x)} tokens of the sample.")


def contributions(name: str, module: DynMoE, hidden_states: Tensor) -> Tensor:
    """(N, F) -> (N, E) float32, norm of the output of every expert for every token. InputError if one is not finite."""
    layout = Layout(module.activation, module.gated, False, False)
    x = hidden_states.to(module.down_proj.dtype)
    biases = [None] * len(module.down_proj) if module.gate_up_bias is None else module.gate_up_bias
    experts = zip(module.gate_up_proj, biases, module.down_proj, strict=True)
    given = torch.stack([(activate(functional.linear(x, up, bias), layout) @ down.T).float().norm(dim=-1) for up, bias, down in experts], 1)
    check_finite(f"outputs of the experts of {name}", given)
    return given


def fit_prototypes(router: ThresholdRouter, hidden_states: Tensor, given: Tensor) -> None:
    """Sets the prototypes whose cosines with tokens, (N, F), best predict `given`, the (N, E) of `contributions`."""
    x = functional.normalize(hidden_states.double(), dim=-1)
    x, y = x - x.mean(0), given.double() - given.double().mean(0)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    router.prototypes.copy_(functional.normalize(torch.linalg.solve(gram, x.T @ y).T, dim=-1))


def fit_thresholds(router: ThresholdRouter, hidden_states: Tensor, given: Tensor) -> None:
    """Sets thresholds with which an expert gets as many tokens as count it among their k largest contributions."""
    k = max(1, round(router.target_k))
    given = torch.where(router.expert_mask, given, -1.0)
    chosen = torch.zeros_like(given).scatter_(1, given.topk(k, dim=1).indices, 1.0)
    number = chosen.sum(0).long().clamp(min=1)
    cosine = cosines(router, hidden_states).sort(0, descending=True).values
    floor = cosine.new_full((1, cosine.shape[1]), OPEN)
    lowest = torch.cat([cosine, floor]).gather(0, torch.stack([number - 1, number]))
    router.thresholds.copy_(torch.where(lowest[1] == OPEN, OPEN, lowest.mean(0)))


def shift_thresholds(router: ThresholdRouter, hidden_states: Tensor) -> float:
    """Shifts all thresholds to `target_k` experts per token on average. Returns the mean reached, in the precision of thresholds."""
    cosine = torch.where(router.expert_mask, cosines(router, hidden_states), -torch.inf)
    start = router.thresholds.clone()

    def mean(shift: float) -> float:
        return mean_experts(router, cosine > (start + shift).float())

    shift = bisect(mean, router.target_k, -4.0, 4.0)
    router.thresholds.copy_(start + shift)
    return mean(shift)
