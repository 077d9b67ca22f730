"""How the layers of a converted model share one budget of experts.

    g_l ‖o_te‖ > λ        λ: one for the model;  g_l = √(mean_t ‖∂L/∂out_t‖²) of the layer's output

To first order, leaving out expert e of token t changes the next token's loss by at most ‖∂L/∂out_t‖ ‖o_te‖. The gradients of single
tokens are not known when a model is used; their mean over a layer is.

N tokens, E experts
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn import DynMoE, ThresholdRouter
from ...nn._search import bisect
from ...ops._dispatch import autocast_off
from .._sample_loss import backward_to_embeddings
from ..interfaces import modes_kept
from .sampling import OPEN, check_finite, contributions, router_of


class Share(dict[str, Tensor]):
    """Layer by name: tokens of the sample that each expert gets, (E,) int64.

    Attributes:
        means: experts per token of each layer.
    """

    means: dict[str, float]


def shared_budget(model: PreTrainedModel, sample: Tensor, layers: Mapping[str, DynMoE], target_k: float) -> Share:
    """Splits `target_k` experts per token, on average over the layers, between layers and experts.

    Args:
        model: converted model with a language head. Weights and their gradients stay as they are.
        sample: (B, T) token ids, run row by row with all experts.
        layers: its mixtures by name, whose routers' bounds hold for each token.
        target_k: mean over layers and tokens.

    Raises:
        InputError: the model has no language head; the loss, its gradient or an output is not finite, or the gradient is 0 everywhere.
    """
    effects = _measured(model, sample, layers)
    most = max(effect.max().item() for effect in effects.values())
    if not most > 0:
        raise InputError("gradient of the loss over the sample must not be 0 in every layer.")

    def means(logarithm: float) -> dict[str, float]:
        return {name: _mean(router_of(layers[name]), effect > math.exp(logarithm)) for name, effect in effects.items()}

    top = math.log(most)
    level = bisect(lambda logarithm: sum(means(logarithm).values()) / len(layers), target_k, top - 40.0, top)
    share = Share({name: (effect > math.exp(level)).sum(0) for name, effect in effects.items()})
    share.means = means(level)
    return share


def _mean(router: ThresholdRouter, passed: Tensor) -> float:
    live = int(router.expert_mask.sum())
    return passed.sum(-1).clamp(router.min_experts, min(router.max_experts, live)).float().mean().item()


def _measured(model: PreTrainedModel, sample: Tensor, layers: Mapping[str, DynMoE]) -> dict[str, Tensor]:
    """g_l ‖o_te‖ of each layer, (N, E) float32; 0 for experts that are not live."""
    norms: dict[str, list[Tensor]] = {name: [] for name in layers}
    squares: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack:
        stack.enter_context(_opened([router_of(layer) for layer in layers.values()]))
        stack.enter_context(modes_kept(model))
        for name, layer in layers.items():

            def watch(module: DynMoE, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                check_finite(f"inputs of {name}", x)
                with torch.no_grad(), autocast_off(x):
                    norms[name].append(contributions(name, module, x))
                out.register_hook(lambda grad: squares[name].append(grad.detach().float().square().sum(-1).flatten()))

            stack.callback(layer.register_forward_hook(watch).remove)
        model.eval()
        for row in sample.to(model.device).split(1):
            backward_to_embeddings(model, {"input_ids": row})
    if missed := [name for name in layers if not squares[name]]:
        raise InputError(f"the sample did not reach {missed[0]}, which must run in every forward.")
    found = {}
    for name, layer in layers.items():
        grad_norm = torch.cat(squares[name]).mean().sqrt()
        if not grad_norm.isfinite():
            raise InputError(f"gradient of the loss over the sample must be finite, and that of the output of {name} is not.")
        found[name] = torch.where(router_of(layer).expert_mask, torch.cat(norms[name]) * grad_norm, 0)
    return found


@contextmanager
def _opened(routers: list[ThresholdRouter]) -> Iterator[None]:
    """Within the block, tokens go to every live expert."""
    before = [(router.thresholds.detach().clone(), router.min_experts, router.max_experts) for router in routers]
    try:
        with torch.no_grad():
            for router in routers:
                router.thresholds.fill_(OPEN)
                router.max_experts = len(router.expert_mask)
        yield
    finally:
        with torch.no_grad():
            for router, (thresholds, least, most) in zip(routers, before, strict=True):
                router.thresholds.copy_(thresholds)
                router.min_experts, router.max_experts = least, most
