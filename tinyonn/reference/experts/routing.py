"""Routing of tokens to experts in float64, differentiated by autograd.

N tokens, F features, E experts, K = max_experts slots of a token
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["sigmoid_cosine", "cosine", "linear"]
Combine = Literal["softmax", "gated", "uniform"]  # weights that the scores determine
Weighting = Literal[Combine, "softmax_logits", "sigmoid", "relu"]  # all weights


class Routing(NamedTuple):
    """Experts of each token, highest score first.

    Attributes:
        top_k_index: (N, K) int64, expert of each slot; E for unused slots.
        top_k_weights: (N, K), weight of each slot's expert; 0 for unused slots.
        count: (N,), number of experts of the token; every score receives its gradient unchanged (straight-through).
        scores: (N, E), margins over the thresholds, or the scores of `select_by_budget`.
    """

    top_k_index: Tensor
    top_k_weights: Tensor
    count: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    scores: Tensor


def margins(hidden_states: Tensor, prototypes: Tensor, thresholds: Tensor, form: Form, scale: float) -> Tensor:
    """Margin of each token over each expert's threshold, (N, E)."""
    g, z = thresholds.double(), logits(hidden_states, prototypes, form, scale)
    if form == "linear":
        return z - g
    return z - g.sigmoid() if form == "cosine" else z.sigmoid() - (scale * g).sigmoid()


def logits(hidden_states: Tensor, prototypes: Tensor, form: Form, scale: float) -> Tensor:
    """(N, E): scale · cosine for "sigmoid_cosine", the cosine for "cosine", P · x / rms(x) for "linear", 0 for a token of zeros."""
    x, p = hidden_states.double(), prototypes.double()
    if form != "linear":
        cosine = unit_vectors(x) @ unit_vectors(p).T
        return cosine if form == "cosine" else scale * cosine
    found = unit_vectors(x) * x.shape[-1] ** 0.5 @ p.T
    return torch.where(found.isfinite(), found, torch.nan)


def own_level(scores: Tensor, rank: int) -> Tensor:
    """(N,), the middle between the scores at this rank, from 1, and the next; the first of both if there is no next; a constant."""
    found = []
    for row in scores.detach():
        ordered = row[row.isfinite()].sort(descending=True).values[rank - 1 : rank + 1]
        found.append(ordered.mean() if len(ordered) else row.new_zeros(()))
    return torch.stack(found) if found else scores.new_zeros(0)


def unit_vectors(x: Tensor) -> Tensor:
    """Vectors scaled to length 1; zero vectors stay zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def threshold_route(
    hidden_states: Tensor,
    prototypes: Tensor,
    thresholds: Tensor,
    *,
    form: Form = "sigmoid_cosine",
    scale: float = 1.0,
    min_experts: int = 1,
    max_experts: int = 8,
    combine: Weighting = "softmax",
    expert_mask: Tensor | None = None,
    level: float = 0.0,
    level_rank: int = 1,
    token_thresholds: Tensor | None = None,
) -> Routing:
    """Routes each token to the experts whose margin is above 0: at least `min_experts`, at most `max_experts`, highest margin first,
    ties to the lower index. With `level` that share of the token's `own_level` is subtracted from its margins, and `token_thresholds`,
    (N,), after it. Experts masked out by `expert_mask` are never chosen. A token with a margin of NaN is routed only to the first such
    expert, with weight and count NaN.
    """
    scores = margins(hidden_states, prototypes, thresholds, form, scale)
    if expert_mask is not None:
        scores = torch.where(expert_mask, scores, -torch.inf)
    if level:
        scores = scores - level * own_level(scores, level_rank).unsqueeze(-1)
    if token_thresholds is not None:
        scores = scores - token_thresholds.double().unsqueeze(-1)
    rank = order_of(scores).argsort(dim=-1)
    chosen = ((rank < min_experts) | ((scores > 0) & (rank < max_experts))) & scores.isfinite()
    z = logits(hidden_states, prototypes, form, scale)
    return _marked(routing_of(scores, chosen, rank, max_experts, combine, z), scores.isnan())


def _marked(found: Routing, unknown: Tensor) -> Routing:
    """Routing with weight and count NaN for each row that has an unknown score, marked in `unknown` (N, E)."""
    num_experts = unknown.shape[-1]
    rows = unknown.any(-1)
    first = torch.full_like(found.top_k_index, num_experts)
    first[:, 0] = unknown.int().argmax(-1)
    weights = torch.zeros_like(found.top_k_weights)
    weights[:, 0] = torch.nan
    return Routing(
        torch.where(rows.unsqueeze(-1), first, found.top_k_index),
        torch.where(rows.unsqueeze(-1), weights, found.top_k_weights),
        torch.where(rows, torch.nan, found.count),
        found.scores,
    )


def select_by_budget(scores: Tensor, budget: Tensor | float, *, max_experts: int = 8, combine: Combine = "softmax") -> Routing:
    """Routes each token to the smallest set of experts whose share of softmax(scores) reaches `budget`; 1 to `max_experts` experts."""
    scores = scores.double()
    share = scores.detach().softmax(-1)
    order = order_of(share)
    before = share.gather(-1, order).cumsum(-1) - share.gather(-1, order)
    rank = order.argsort(-1)
    limit = torch.as_tensor(budget, dtype=torch.float64, device=scores.device).expand(len(scores)).unsqueeze(-1)
    chosen = ((rank == 0) | ((before.gather(-1, rank) < limit) & (rank < max_experts))) & (share > 0)
    unknown = share.isnan() & (scores != -torch.inf)
    return _marked(routing_of(scores, chosen, rank, max_experts, combine), unknown)


def routing_of(scores: Tensor, chosen: Tensor, rank: Tensor, max_experts: int, combine: Weighting, logits: Tensor | None = None) -> Routing:
    """Weights over the chosen experts, sorted by rank.

    "softmax": softmax of the scores, with the mask as a constant. "gated": positive scores divided by their sum, equal weights if none is
    positive. "uniform": equal weights; the derivative of the mask with respect to each score is taken as 1. "softmax_logits": softmax of
    the logits, with the mask as a constant. "sigmoid": sigmoid of the logits. "relu": positive scores, 0 for others.
    """
    num_experts = scores.shape[-1]
    mask = straight_through(chosen, scores)
    if combine == "softmax":
        weights = torch.where(chosen, scores, -torch.inf).softmax(-1)
    elif combine == "uniform":
        weights = mask / torch.where(chosen.any(-1, keepdim=True), mask.sum(-1, keepdim=True), 1)
    elif combine == "softmax_logits":
        assert logits is not None
        weights = torch.where(chosen, logits, -torch.inf).softmax(-1)
    elif combine == "sigmoid":
        assert logits is not None
        weights = logits.sigmoid()
    elif combine == "relu":
        weights = torch.where(chosen, scores.clamp(min=0), 0)
    else:
        positive = torch.where(chosen, scores.clamp(min=0), 0)
        total = positive.sum(-1, keepdim=True)
        equal = chosen / chosen.sum(-1, keepdim=True)
        weights = torch.where(total > 0, positive / torch.where(total > 0, total, 1), equal)
    slots = max_experts
    index = torch.full((len(scores), slots), num_experts, device=scores.device)
    slot_weights = scores.new_zeros(len(scores), slots)
    token, expert = chosen.nonzero(as_tuple=True)
    index[token, rank[token, expert]] = expert
    slot_weights = slot_weights.index_put((token, rank[token, expert]), weights[token, expert])
    return Routing(index, slot_weights, mask.sum(-1), scores)


def order_of(scores: Tensor) -> Tensor:
    """Experts from the highest score to the lowest, (N, E); ties to the lower index, NaN last."""
    return scores.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(dim=-1, descending=True, stable=True)


def straight_through(chosen: Tensor, scores: Tensor) -> Tensor:
    """1 for chosen experts, else 0; its derivative with respect to the scores is taken as 1."""
    known = torch.where(scores.isfinite(), scores, 0)
    return chosen.to(scores.dtype) + known - known.detach()
