"""`threshold_route` and `select_by_budget`: checks, dispatch. Differentiated by autograd, without reads on the host."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ... import reference
from ..._debug import debug_enabled
from ...reference.experts.routing import Combine, Form, Routing, Weighting
from .._checks import check_choice, check_float, check_mask, check_no_nan, check_number, check_same_device, check_size, check_tensor
from .._dispatch import statistics_dtype, without_autocast

IMPLS = ("auto", "torch", "reference")


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
    impl: str = "auto",
) -> Routing:
    """Routes each token to all experts whose threshold it exceeds.

        l = σ(scale · cos(x, P)) − σ(scale · G)      "sigmoid_cosine"
        l = cos(x, P) − σ(G)                         "cosine"
        l = P · x / rms(x) − G                       "linear"

    Cosines are accurate for vectors of any length above 0 that the dtype can store; the cosine of a zero vector is 0, and so is
    its product in "linear".
    Experts with l > 0 are active: at least `min_experts`, at most `max_experts`, highest l first, ties to the lower index. A token
    that contains NaN or infinity is routed to one expert with weight NaN, so that its output is NaN. The same holds for every token if a
    prototype or threshold is NaN. Under `tinyonn.debug()` both are errors.

    Args:
        hidden_states: (N, F), x.
        prototypes: (E, F), P.
        thresholds: (E,), G.
        form: formula of l, see above. With random prototypes and G = 0, "cosine" activates no expert and "sigmoid_cosine" half of them;
            `nn.ThresholdRouter` initialises G for a mean number of experts.
        scale: scale of the sigmoids of "sigmoid_cosine", above 0. The length of a prototype is the scale of "linear".
        min_experts, max_experts: bounds of the number of experts per token; the result always has max_experts slots.
        combine: weights of the active experts: "softmax", the softmax of l over the active set, which counts as constant; "gated",
            l / Σ l over the experts with l > 0, equal weights if there are none; "uniform", equal weights with a straight-through gradient;
            "softmax_logits", the softmax over the active set of what is compared with the threshold: P · x / rms(x), scale · cos(x, P), or
            cos(x, P); "sigmoid", its sigmoid, which does not depend on the threshold; "relu", l, or 0 below the threshold. The weights of
            the last two do not sum to 1.
        expert_mask: (E,) bool, True for experts that may be chosen; the scores of the others are -inf. None for all. A mask without any
            expert leaves every slot unused, and is an error under `tinyonn.debug()`.
        level: share, 0 … 1, of a token's own level that is subtracted from all of its l, as a constant. The level is the middle between its
            l at `level_rank` and the next one. With 0 thresholds are absolute; the nearer to 1, the less the numbers of experts of tokens
            differ; with 1 each token uses `level_rank` experts.
        level_rank: at least 1.
        token_thresholds: (N,), subtracted from all l of a token after its level; None for 0.
        impl: "auto", "torch" or "reference".

    Returns:
        Routing(top_k_index, top_k_weights, count, scores); float32, or float64 for float64 inputs. `count` carries the straight-through
        gradient, for `sparse_diversity_loss`; `scores` is l, for `surprise_min_loss`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; max_experts < min_experts; NaN under `tinyonn.debug()`.

    Source: threshold gating after Guo et al., "Dynamic Mixture of Experts", arXiv:2405.14297.
    """
    check_float("hidden_states", hidden_states)
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must have shape (N, F), got {tuple(hidden_states.shape)}.")
    if hidden_states.shape[1] == 0:
        raise ValueError(f"hidden_states must have at least 1 feature, got shape {tuple(hidden_states.shape)}.")
    check_tensor("prototypes", prototypes, hidden_states.device)
    if prototypes.dim() != 2 or prototypes.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"prototypes must have shape (E, {hidden_states.shape[1]}), got {tuple(prototypes.shape)}.")
    check_tensor("thresholds", thresholds, hidden_states.device, prototypes.shape[:1])
    check_mask("expert_mask", expert_mask, thresholds.shape, hidden_states.device)
    check_choice("form", form, get_args(Form))
    check_choice("combine", combine, get_args(Weighting))
    check_choice("impl", impl, IMPLS)
    check_number("scale", scale, above=0)
    if token_thresholds is not None:
        check_tensor("token_thresholds", token_thresholds, hidden_states.device, hidden_states.shape[:1])
    check_number("level", level, at_least=0, at_most=1)
    check_size("level_rank", level_rank)
    check_size("min_experts", min_experts, least=0)
    check_size("max_experts", max_experts)
    if max_experts < min_experts:
        raise ValueError(f"max_experts must be at least min_experts, {min_experts}, got {max_experts}.")
    if debug_enabled():
        if expert_mask is not None and not bool(expert_mask.any()):
            raise ValueError("expert_mask masks out every expert.")
        for name, tensor in (("hidden_states", hidden_states), ("prototypes", prototypes), ("thresholds", thresholds)):
            _check_finite(name, tensor)
    if impl == "reference":
        found = reference.threshold_route(
            hidden_states, prototypes, thresholds, form=form, scale=scale, min_experts=min_experts, max_experts=max_experts,
            combine=combine, expert_mask=expert_mask, level=level, level_rank=level_rank,
            token_thresholds=token_thresholds,
        )  # fmt: skip
        return _narrow(found, statistics_dtype(hidden_states.dtype))
    logits: Tensor | None = router_logits(hidden_states, prototypes, form, scale)
    assert logits is not None
    scores = _margins(logits, thresholds, form, scale)
    if combine not in ("softmax_logits", "sigmoid"):
        logits = None  # frees N · E numbers
    if expert_mask is not None:
        scores = torch.where(expert_mask, scores, -torch.inf)
    if level:
        scores = scores - level * own_level(scores, level_rank)
    if token_thresholds is not None:
        scores = scores - token_thresholds.to(scores.dtype).unsqueeze(-1)
    values, index = _highest(scores, max_experts)
    slot = torch.arange(max_experts, device=scores.device)
    used = values.isfinite() & ((slot < min_experts) | (values > 0))
    return _routing(scores, index, used, values[:, :1] == math.inf, combine, logits)


def select_by_budget(
    scores: Tensor, budget: Tensor | float, *, max_experts: int = 8, combine: Combine = "softmax", impl: str = "auto"
) -> Routing:
    """Routes each token to the smallest set of experts whose share of softmax(scores) reaches a budget.

    Args:
        scores: (N, E), such as `Routing.scores`.
        budget: share of the softmax, 0 … 1; a number or (N,). At least one and at most `max_experts` experts are chosen; ties go to the
            lower index. A row with NaN or positive infinity gets one expert, with weight NaN.
        max_experts: number of slots.
        combine: weights of the chosen experts, as in `threshold_route`.
        impl: "auto", "torch" or "reference".

    Returns:
        Routing, as in `threshold_route`.

    Raises:
        TypeError, ValueError: a shape or dtype that is not accepted; a budget outside 0 … 1; NaN in scores. The values of tensors are
            checked under `tinyonn.debug()` only.
    """
    check_float("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (N, E), got {tuple(scores.shape)}.")
    check_choice("combine", combine, get_args(Combine))
    check_choice("impl", impl, IMPLS)
    check_size("max_experts", max_experts)
    if isinstance(budget, Tensor):
        check_float("budget", budget, min_dim=0)
        check_same_device("budget", budget, scores.device)
        if budget.shape not in ((), scores.shape[:1]):
            raise ValueError(f"budget must have shape () or ({scores.shape[0]},), got {tuple(budget.shape)}.")
        if debug_enabled() and not bool(((budget >= 0) & (budget <= 1)).all()):
            raise ValueError(f"budget must be at least 0 and at most 1, got {budget}.")
    else:
        check_number("budget", budget, at_least=0, at_most=1)
    if debug_enabled():
        check_no_nan("scores", scores)
    wide = scores.to(statistics_dtype(scores.dtype))
    if impl == "reference":
        return _narrow(reference.select_by_budget(scores, budget, max_experts=max_experts, combine=combine), wide.dtype)
    share, index = _highest(_shares(wide), max_experts)
    # `float`, because a number of NumPy, compared to another, gives NumPy's truth value, which no tensor takes.
    limit: Any = budget.to(share.dtype).reshape(-1, 1) if isinstance(budget, Tensor) else float(budget)
    before = share.cumsum(-1) - share
    slot = torch.arange(max_experts, device=share.device)
    there = share > 0  # not masked, and more than 0 in this precision
    whole = limit >= 1  # rounded sums may reach 1 before the last expert, or never
    return _routing(wide, index, there & ((slot == 0) | (before < limit) | whole), share[:, :1] == math.inf, combine)


def _shares(scores: Tensor) -> Tensor:
    """Softmax, 0 for masked experts; a score of NaN or positive infinity makes the row's other shares NaN."""
    scores = scores.detach()
    return torch.where(scores == -math.inf, 0, scores.softmax(-1))


@without_autocast
def router_logits(hidden_states: Tensor, prototypes: Tensor, form: Form, scale: float) -> Tensor:
    """(N, E), before thresholds: scale · cosine, the cosine for "cosine", or P · x / rms(x) for "linear", NaN where that is not finite."""
    dtype = statistics_dtype(hidden_states.dtype)
    x, p = hidden_states.to(dtype), prototypes.to(dtype)
    if form != "linear":
        cosine = unit_vectors(x) @ unit_vectors(p).T
        return cosine if form == "cosine" else scale * cosine
    found = (unit_vectors(x) * x.shape[-1] ** 0.5) @ p.T
    return torch.where(found.isfinite(), found, torch.nan)


def _margins(logits: Tensor, thresholds: Tensor, form: Form, scale: float) -> Tensor:
    g = thresholds.to(logits.dtype)
    if form == "linear":
        return logits - g
    return logits - g.sigmoid() if form == "cosine" else logits.sigmoid() - (scale * g).sigmoid()


def own_level(scores: Tensor, rank: int) -> Tensor:
    """(N, 1), the middle between each row's score at this rank, from 1, and the next, or that score if there is no next; 0 for fewer
    finite scores than this rank.
    """
    if rank > scores.shape[-1]:
        return scores.new_zeros(scores.shape[0], 1)
    known = torch.where(scores.isfinite(), scores.detach(), -torch.inf)
    highest = known.topk(min(rank + 1, scores.shape[-1])).values
    first, second = highest[:, rank - 1 : rank], highest[:, -1:]
    level = torch.where(second.isfinite(), (first + second) / 2, first)
    return torch.where(level.isfinite(), level, 0)


def unit_vectors(x: Tensor) -> Tensor:
    """(N, F) scaled to length 1; zero vectors stay zero.

    Division by the largest entry comes first, because squares of 1e-30 or 1e30 leave the range of float32. It does not change the
    direction, so it needs no gradient.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def _highest(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The `slots` highest scores of each row and their experts, ties to the lower index. NaN becomes inf and comes first; slots beyond the
    number of experts hold -inf.
    """
    scores = scores.detach()
    known = torch.where(scores.isnan(), torch.inf, scores)
    experts = known.shape[-1]
    if known.dtype == torch.float64:
        values, index = known.sort(dim=-1, descending=True, stable=True)
        values, index = values[:, :slots], index[:, :slots]
    else:
        # topk does not define the order of equal scores: an integer key orders by score, then by index.
        bits = (known + 0.0).view(torch.int32).long()  # -0 becomes 0
        ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        key = ordered * (1 << 31) + (experts - 1 - torch.arange(experts, device=scores.device))
        index = key.topk(min(slots, experts), dim=-1, sorted=True).indices
        values = known.gather(-1, index)
    if slots > experts:
        values = functional.pad(values, (0, slots - experts), value=-torch.inf)
        index = functional.pad(index, (0, slots - experts), value=experts)
    return values, index


def _routing(scores: Tensor, index: Tensor, used: Tensor, unknown: Tensor, combine: Weighting, logits: Tensor | None = None) -> Routing:
    """Routing with the used slots. Rows marked in `unknown` (N, 1) use the first slot alone, with weight and count NaN."""
    num_experts = scores.shape[-1]
    used = torch.where(unknown, torch.arange(index.shape[-1], device=index.device) == 0, used)
    top_k_index = torch.where(used, index, num_experts)
    known = torch.where(scores == -torch.inf, 0, scores)
    known = torch.where(known == torch.inf, torch.nan, known)
    slots = functional.pad(known, (0, 1)).gather(-1, top_k_index) * torch.where(unknown, torch.nan, 1)
    count = used.sum(-1) + _step(known).sum(-1)
    match combine:
        case "softmax":
            none = ~used.any(-1, keepdim=True)
            weights = torch.where(used | none, slots, -torch.inf).softmax(-1)
        case "uniform":
            weights = (1 + _step(slots)) / torch.where(count == 0, 1, count).unsqueeze(-1)
        case "gated":
            positive = torch.where(used, slots.clamp(min=0), 0)
            total = positive.sum(-1, keepdim=True)
            equal = used / used.sum(-1, keepdim=True).clamp(min=1)
            weights = torch.where(total <= 0, equal, positive / torch.where(total <= 0, 1, total))
        case "relu":
            weights = slots.clamp(min=0)
        case "softmax_logits" | "sigmoid":
            assert logits is not None
            # The product of the token's NaN reaches the weight as in `slots`.
            plain = functional.pad(logits, (0, 1)).gather(-1, top_k_index) * torch.where(unknown, torch.nan, 1)
            none = ~used.any(-1, keepdim=True)
            weights = plain.sigmoid() if combine == "sigmoid" else torch.where(used | none, plain, -torch.inf).softmax(-1)
    return Routing(top_k_index, torch.where(used, weights, 0), count, scores)


def _step(scores: Tensor) -> Tensor:
    """Zeros with the gradient of the scores."""
    return scores - scores.detach()


def _narrow(found: Routing, dtype: torch.dtype) -> Routing:
    return Routing(found.top_k_index, found.top_k_weights.to(dtype), found.count.to(dtype), found.scores.to(dtype))


def _check_finite(name: str, tensor: Tensor) -> None:
    count = int((~tensor.isfinite()).sum())
    if count:
        raise ValueError(f"{name} must be finite, got NaN or infinity in {count} of {tensor.numel()} values.")
