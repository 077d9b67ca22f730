"""Routers of a converted model from a sample of text.

N tokens, F features, E experts

The contribution of an expert to a token is the norm of its output, ‖o‖; all experts run on a sample to measure it. Prototypes are the
directions that best predict it, by ridge regression on the directions of the tokens. With its threshold, an expert gets as many tokens as
it has contributions above one price for the model (see `price`), or as many as count it among their k largest contributions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..._io.units import counted
from ...errors import InputError
from ...nn import DynMoE, ThresholdRouter
from ...nn._search import bisect
from ...nn.threshold_router import cosines, mean_experts
from ...ops._checks import check_choice, check_flag
from .._converted import converted_model, recorded
from ..peft_parts import adapter_of, keep_in_adapter, running_statistics
from .options import DynMoEOptions
from .price import shared_budget
from .sampling import OPEN, check_sample, contributions, mixtures, router_of, run_sample
from .saving import DYN_MOE

Price = Literal["gradient", "none"]
RIDGE = 0.3  # relative to the mean variance of a feature; a sample has few tokens per feature


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
    price: Price = "gradient",
) -> dict[str, float]:
    """Sets the thresholds of a converted model so that a token goes to `target_k` experts on average over tokens and layers.

    With price="gradient" the budget is one for the model. A backward pass over the sample with all experts measures how much a layer's
    output matters to the next token's loss; a layer, and each of its experts, then gets the tokens whose contribution is worth more than
    one price. With price="none" every layer gets `target_k`.

    Layers are calibrated from first to last, each on the output of the already sparse layers below it. Experts that `expert_mask` excludes
    are not counted. After an error every layer is as it was before.

    Args:
        model: model that `convert_mlp_to_dynmoe` has converted.
        sample: (B, T) token ids without padding, run in one batch; a few thousand tokens are enough.
        target_k: mean number of experts per token, between min_experts and max_experts.
        min_experts, max_experts: bounds of the number of experts per token; None for all. If both equal target_k, routing is a plain top-k.
        shift: whether all thresholds of a layer move by the same amount, which keeps what they learned; layers keep their parts of the
            budget. Otherwise each threshold is set anew.
        price: "gradient", which needs a model with a language head, or "none", with which an expert gets as many tokens as have it among
            their `target_k` largest contributions. Without effect with `shift`, or if the bounds are equal.

    Returns:
        Mean number of experts per token over the sample, by name of the layer.

    Raises:
        InputError: the model is not converted, or routes by budget; the sample does not reach a layer, or its values there are not finite;
            with price="gradient", the model gives no logits, or the gradient of the loss is not finite.
        ValueError: price is not one of the two; a target or bound is out of range; the sample has another shape or type, ids outside the
            vocabulary, or too few tokens for each expert to get one.
    """
    check_choice("price", price, get_args(Price))
    converted = converted_model(model, DYN_MOE) if isinstance(model, nn.Module) else None
    if converted is None:
        raise InputError(f"model must be converted by convert_mlp_to_dynmoe, got an unconverted {type(model).__name__}.")
    conversion = recorded(converted.config)[DYN_MOE]
    options = DynMoEOptions(**conversion["options"])
    if options.routing != "threshold":
        raise InputError(f"routing must be 'threshold' to calibrate a model, got {options.routing!r}; choose a budget instead.")
    check_flag("shift", shift)
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
    with _put_back_after_an_error(layers.values(), tuple(bounds)):
        parts = _parts(layers, target_k) if shift else dict.fromkeys(layers, float(target_k))
        for module in layers.values():
            for key, value in bounds.items():
                setattr(router_of(module), key, value)
        given: dict[str, Tensor] = {}
        if price == "gradient" and not shift and bounds["min_experts"] < bounds["max_experts"]:
            given = (share := shared_budget(model, sample, layers, target_k))
            parts = share.means

        def set_layer(name: str, module: Any, x: Tensor) -> None:
            router = router_of(module)
            router.target_k = parts[name]
            if not shift:
                fit_thresholds(router, x, given[name] if given else tokens_by_rank(router, contributions(name, module, x)))
            reached[name] = shift_thresholds(router, x)

        run_sample(model, sample, dict(layers), set_layer)
    conversion["options"] |= bounds
    for name, module in layers.items():
        _recorded_layer(conversion["layers"], name)["target_k"] = parts[name]
        module.reset_statistics()
    return reached


def _recorded_layer(layers: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The record of a layer: a base model, a model with a head and one with an adapter name it differently."""
    return next(given for known, given in layers.items() if f".{known}".endswith(f".{name}") or f".{name}".endswith(f".{known}"))


def _parts(layers: dict[str, DynMoE], target_k: float) -> dict[str, float]:
    """Each layer's part of another budget, in proportion to its present one; their mean is `target_k`."""
    routers = {name: router_of(module) for name, module in layers.items()}

    def parts(factor: float) -> dict[str, float]:
        bounds = {name: (router.min_experts, min(router.max_experts, int(router.expert_mask.sum()))) for name, router in routers.items()}
        return {name: min(max(router.target_k * factor, bounds[name][0], 1e-6), bounds[name][1]) for name, router in routers.items()}

    largest = max(router.target_k for router in routers.values())
    smallest = min(router.target_k for router in routers.values())
    if largest == smallest:
        return dict.fromkeys(layers, float(target_k))
    most = max(router.max_experts for router in routers.values()) / smallest
    # The mean rises with the factor; `bisect` takes a falling function.
    return parts(-bisect(lambda negative: sum(parts(-negative).values()) / len(parts(-negative)), target_k, -most, 0.0))


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


def fit_prototypes(router: ThresholdRouter, hidden_states: Tensor, given: Tensor) -> None:
    """Sets the prototypes whose cosines with tokens, (N, F), best predict `given`, the (N, E) of `contributions`."""
    x = functional.normalize(hidden_states.double(), dim=-1)
    x, y = x - x.mean(0), given.double() - given.double().mean(0)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    router.prototypes.copy_(functional.normalize(torch.linalg.solve(gram, x.T @ y).T, dim=-1))


def tokens_by_rank(router: ThresholdRouter, given: Tensor) -> Tensor:
    """(E,) int64, tokens that count each expert among their k largest of `given`, the (N, E) of `contributions`."""
    k = max(1, round(router.target_k))
    given = torch.where(router.expert_mask, given, -1.0)
    return torch.zeros_like(given).scatter_(1, given.topk(k, dim=1).indices, 1.0).sum(0).long()


def fit_thresholds(router: ThresholdRouter, hidden_states: Tensor, tokens: Tensor) -> None:
    """Sets thresholds with which each expert gets this number of tokens, (E,), at least one."""
    number = tokens.clamp(min=1)
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
