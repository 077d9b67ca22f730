"""`surprise_min_loss` and `sparse_diversity_loss`: losses of a router. Differentiated by autograd, without reads on the host."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ..._debug import debug_enabled
from ...reference.experts.surprise import Among
from .._checks import check_choice, check_float, check_mask, check_no_nan, check_number, check_tensor
from .._dispatch import statistics_dtype, without_autocast
from .threshold_route import unit_vectors


def surprise_min_loss(
    scores: Tensor,
    surprise: Tensor,
    *,
    w_ce: float = 1.0,
    w_kl: float = 1.0,
    temperature: float = 1.0,
    among: Among = "all",
    token_mask: Tensor | None = None,
) -> Tensor:
    """Loss that pulls a router's scores towards the experts with the lowest surprise.

    With the surprise kinds "down_proj" and "output" of `expert_mlp`, the result does not depend on the differentiated loss: the norm
    of its gradient is common to a token's experts and cancels with the mean. The target is then the expert with the lowest weight · ‖h‖, or
    the lowest weight.

        S' = surprise / (mean of |surprise| over the token's finite pairs) / temperature
        w_ce · CE(scores, argmin S') + w_kl · KL(softmax(−S') ‖ softmax(scores))

    With the kind "saving" pass −saving: the expert of greatest saving then has the least surprise.

    Division by the mean removes the scale of the surprise: the loss scale of AMP, and small values that would make the softmax uniform.

    Args:
        scores: (N, E), scores of all experts, such as `Routing.scores`.
        surprise: (N, E), result of `scatter_surprise`. The target ignores experts whose surprise is infinite; NaN makes the loss NaN. Not
            differentiable.
        w_ce, w_kl: weights of the two terms, at least 0.
        temperature: temperature of the target, above 0; lower is sharper.
        among: "all", softmax of the scores of all experts: experts that did not see the token lose to those that did; "chosen", of those
            that saw it, so that no other score gets a gradient.
        token_mask: (N,) bool, True for tokens that count; None for all. Tokens without experts never count, nor do tokens whose surprise
            is 0 for all of their experts: no loss depends on them (a last token, a label of -100), so no expert has the lowest surprise.

    Returns:
        Mean over the tokens that count, 0-d, float32 or float64; 0 if no token counts.

    Raises:
        TypeError, ValueError: shapes or devices do not agree; a weight or the temperature is out of range; under `tinyonn.debug()`, a NaN
            in scores or surprise.
    """
    check_float("scores", scores)
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must have shape (N, E), got {tuple(scores.shape)}.")
    check_tensor("surprise", surprise, scores.device, scores.shape)
    check_number("temperature", temperature, above=0)
    check_number("w_ce", w_ce, at_least=0)
    check_number("w_kl", w_kl, at_least=0)
    check_choice("among", among, get_args(Among))
    check_mask("token_mask", token_mask, scores.shape[:1], scores.device)
    if debug_enabled():
        check_no_nan("scores", scores)
        check_no_nan("surprise", surprise)
    return _surprise_min_loss(scores, surprise.detach(), w_ce, w_kl, temperature, among, token_mask)


@without_autocast
def _surprise_min_loss(
    scores: Tensor, surprise: Tensor, w_ce: float, w_kl: float, temperature: float, among: Among, token_mask: Tensor | None
) -> Tensor:
    dtype = statistics_dtype(scores.dtype)
    surprise = surprise.to(dtype)
    finite = surprise.isfinite()
    number = finite.sum(-1, keepdim=True)
    unknown = surprise.isnan().any(-1)
    known = torch.where(finite, surprise, 0)
    largest = known.abs().amax(-1, keepdim=True)
    counts = (largest.squeeze(-1) > 0) | unknown
    if token_mask is not None:
        counts = counts & token_mask
    known = known / torch.where(largest > 0, largest, 1)  # so that the sum stays finite
    mean = known.abs().sum(-1, keepdim=True) / number.clamp(min=1)
    scaled = known / torch.where(mean > 0, mean, 1) / temperature
    logits = torch.where(finite | (number == 0), -scaled, -torch.inf)
    log_target = logits.log_softmax(-1)
    scores = torch.where(counts.unsqueeze(-1), scores, 0).to(dtype)
    if among == "chosen":
        scores = torch.where(finite | ~counts.unsqueeze(-1), scores, -torch.inf)
    log_scores = scores.log_softmax(-1)
    del scores  # frees N · E numbers
    least = log_scores.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    apart = torch.where(finite, log_target.exp() * torch.where(finite, log_target - log_scores, 0), 0).sum(-1)
    loss = torch.where(counts, torch.where(unknown, torch.nan, 1) * (w_kl * apart - w_ce * least), 0)
    return loss.sum() / counts.sum().clamp(min=1)


def sparse_diversity_loss(
    prototypes: Tensor, count: Tensor, target_k: float, *, token_mask: Tensor | None = None, expert_mask: Tensor | None = None
) -> Tensor:
    """Loss that keeps prototypes apart and short, and the mean number of experts per token at a target.

        ‖cos(P, P) − I‖_F + mean ‖P_e‖ + |mean count − target_k|

    Args:
        prototypes: (E, F).
        count: (N,), `Routing.count`, whose gradient is straight-through.
        target_k: target number of experts per token, above 0.
        token_mask: (N,) bool, True for tokens that count; the loss is 0 if none does.
        expert_mask: (E,) bool, True for prototypes that count.

    Returns:
        0-d, float32 or float64.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree.
    """
    check_float("prototypes", prototypes)
    check_tensor("count", count, prototypes.device)
    if prototypes.dim() != 2:
        raise ValueError(f"prototypes must have shape (E, F), got {tuple(prototypes.shape)}.")
    if count.dim() != 1 or not count.shape[0]:
        raise ValueError(f"count must have shape (N,), N at least 1, got {tuple(count.shape)}.")
    check_number("target_k", target_k, above=0)
    check_mask("token_mask", token_mask, count.shape, prototypes.device)
    check_mask("expert_mask", expert_mask, prototypes.shape[:1], prototypes.device)
    return _sparse_diversity_loss(prototypes, count, target_k, token_mask, expert_mask)


@without_autocast
def _sparse_diversity_loss(
    prototypes: Tensor, count: Tensor, target_k: float, token_mask: Tensor | None, expert_mask: Tensor | None
) -> Tensor:
    p = prototypes.to(statistics_dtype(prototypes.dtype))
    live = p.new_ones(p.shape[0]) if expert_mask is None else expert_mask.to(p.dtype)
    tokens = p.new_ones(count.shape[0]) if token_mask is None else token_mask.to(p.dtype)
    p = torch.where(live.unsqueeze(-1) > 0, p, 0)
    unit = unit_vectors(p)
    apart = unit @ unit.T - live.diag()
    mean = torch.where(tokens > 0, count.to(p.dtype), 0).sum() / tokens.sum().clamp(min=1)
    loss = apart.norm() + p.norm(dim=-1).sum() / live.sum().clamp(min=1) + (mean - target_k).abs()
    return torch.where(tokens.any(), loss, 0)
