"""Router of a mixture: a prototype and a threshold for each expert.

N tokens, F features, E experts, K = max_experts slots per token
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import Routing, select_by_budget, threshold_route
from ..ops._checks import check_choice, check_number, check_size
from ..ops.experts.threshold_route import Form, Weighting, own_level, router_logits, unit_vectors
from ._search import bisect
from .demand import Demand, apply_demand, record_demand
from .expert_rows import set_row
from .running_thresholds import DECAY, EXTRA, FLOOR, Graphs, apply_thresholds, between, is_ready, record_scores, watched_weights
from .surprise_budget import Budget
from .wide_buffers import WideBuffers

Combine = Weighting | Literal["unit"]
Thresholds = Literal["learned", "quantile", "balanced"]


class ThresholdRouter(WideBuffers):
    """Router with a prototype and a threshold per expert: a token uses the experts whose similarity exceeds their threshold.

    At the start, tokens of random direction pass `target_k` thresholds on average; `calibrate` sets thresholds for real tokens.

    With thresholds="quantile" or "balanced" a threshold is `thresholds[e] + price`, both buffers. `thresholds[e]` follows the score that a
    share target_k / E of the tokens exceed ("quantile"), or takes small steps towards equal load ("balanced"), so every expert gets tokens;
    `price` holds the mean number of experts at `target_k`. `running_thresholds` has the formulas. A `DynMoE` updates them in its training
    forwards, outside of backward, and never in evaluation; calls of a router alone need `apply_recorded` before and `record` after them.
    What a step recorded counts from the first forward after its backward. Transforms of torch.func leave thresholds as they are.

    Args:
        hidden_size: F.
        num_experts: E.
        target_k: mean number of experts per token at the start, between min_experts and max_experts.
        num_live: number of experts in use, the first ones; None for all. The buffer `expert_mask` marks them and is saved.
        thresholds: "learned", parameters that gradients train, or "quantile" or "balanced", see above; these take form="linear" or
            "sigmoid_cosine".
        level: see `ops.threshold_route`; its rank is target_k, rounded. Above 0 it takes form="linear".
        demand: 0 or more; how strongly the number of experts of a token follows its predicted surprise: it grows like the square of the
            surprise to this power, so with 0.5 like the surprise. Above 0 it takes running thresholds and form="linear". The prediction is
            a linear head in buffers, which each backward teaches; `nn/demand.py` has the formulas.
        form, min_experts, max_experts: see `ops.threshold_route`.
        scale: see `ops.threshold_route`; other than 1 only with form="sigmoid_cosine".
        combine: a kind of `ops.threshold_route`, or "unit": weight 1 for each active expert, with the gradient of "uniform"
            (straight-through). Use it if the experts are parts of one MLP, which their sum equals. "sigmoid" is here multiplied by 2 /
            target_k, so that the weights of a token sum to about 1 at first. Routing by budget takes none of "softmax_logits", "sigmoid"
            and "relu".

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    expert_mask: Tensor
    thresholds: Tensor
    price: Tensor | None
    spread: Tensor
    pending: Tensor
    updates: Tensor
    era: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        target_k: float,
        *,
        num_live: int | None = None,
        thresholds: Thresholds = "learned",
        form: Form = "sigmoid_cosine",
        scale: float = 1.0,
        min_experts: int = 1,
        max_experts: int = 8,
        combine: Combine = "softmax",
        level: float = 0.0,
        demand: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_live = num_experts if num_live is None else num_live
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("num_live", num_live)):
            check_size(name, value)
        for name, value in (("min_experts", min_experts), ("max_experts", max_experts)):
            check_size(name, value, 0)
        if num_live > num_experts:
            raise ValueError(f"num_live must be 1 … {num_experts}, got {num_live}.")
        if min_experts > max_experts or max_experts < 1:
            raise ValueError(f"max_experts must be at least 1 and at least min_experts, got {max_experts} and {min_experts}.")
        max_experts = min(max_experts, num_experts)
        check_choice("form", form, get_args(Form))
        check_choice("combine", combine, (*get_args(Weighting), "unit"))
        check_choice("thresholds", thresholds, get_args(Thresholds))
        if thresholds != "learned" and form == "cosine":
            raise ValueError(
                f"form must be linear or sigmoid_cosine with thresholds={thresholds!r}, got cosine, whose thresholds are above 0."
            )
        check_number("level", level, at_least=0, at_most=1)
        if level and form != "linear":
            raise ValueError(f"level must be 0 unless form='linear', got {level:g} with form={form!r}.")
        check_number("demand", demand, at_least=0)
        if demand and (thresholds == "learned" or form != "linear"):
            raise ValueError(f"demand must be 0 with thresholds='learned' or a form of cosines, got {demand:g}.")
        check_number("scale", scale, above=0)
        if scale != 1 and form != "sigmoid_cosine":
            raise ValueError(f"scale must be 1 unless form='sigmoid_cosine', got {scale:g} with form={form!r}.")
        self.target_k, self.num_live, self.form, self.scale = target_k, num_live, form, scale
        self.min_experts, self.max_experts, self.combine, self.level, self.demand = min_experts, max_experts, combine, level, demand
        self._check_target(target_k, num_live)
        self.prototypes = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.thresholds_kind = thresholds
        self.graphs = Graphs()
        self.head: Demand | None = None
        if thresholds == "learned":
            self.thresholds = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
            self.price = None
        else:
            wide = torch.float64 if self.prototypes.dtype == torch.float64 else torch.float32
            kept = num_experts * (2 if thresholds == "balanced" else 1)
            sizes = {"thresholds": (num_experts,), "price": (), "spread": (), "pending": (kept + EXTRA,)}
            for name, size in sizes.items():
                self.register_buffer(name, torch.zeros(size, device=device, dtype=wide))
            if demand:
                self.head = Demand(hidden_size, device, wide)
            self.register_buffer("updates", torch.zeros((), device=device, dtype=torch.int64))
            self.register_buffer("era", torch.full((), -1, device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("expert_mask", torch.empty(num_experts, device=device, dtype=torch.bool))
        self.reset_parameters()

    def _check_target(self, target_k: float, num_live: int) -> None:
        check_number("target_k", target_k)
        if not max(self.min_experts, 1e-6) <= target_k <= min(self.max_experts, num_live):
            raise ValueError(f"target_k must be {self.min_experts} … {min(self.max_experts, num_live)}, got {target_k}.")

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.prototypes.normal_(std=self.prototypes.shape[1] ** -0.5)
            self.expert_mask.copy_(torch.arange(len(self.expert_mask), device=self.expert_mask.device) < self.num_live)
            self._forget()
            if self.thresholds.is_meta:
                return
            # Calibration on random directions holds for any width, and includes clipping to K and to min_experts.
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(1024, self.prototypes.shape[1], generator=generator, device="cpu")
            self.calibrate(sample.to(self.prototypes.device))

    def _forget(self) -> None:
        """Drops what was recorded for running thresholds."""
        if self.price is not None:
            for buffer in (self.price, self.spread, self.pending, self.updates):
                buffer.zero_()
            self.forget_era()
            if self.head is not None:
                self.head.reset_parameters()

    def forget_era(self) -> None:
        if self.price is not None:
            self.era.fill_(-1)

    @torch.no_grad()
    def calibrate(self, hidden_states: Tensor, target_k: float | None = None) -> float:
        """Sets thresholds at which these tokens use `target_k` experts on average: one score for all experts, or, with running thresholds,
        the score of each expert that a share target_k / E exceeds, and the price.

        Args:
            hidden_states: (..., F), at least one token.
            target_k: mean number of experts per token; None for the router's own.

        Returns:
            The mean number of experts with the stored thresholds, which half precision rounds.

        Raises:
            ValueError: form="cosine" cannot reach the target; the target is out of range; hidden_states has no token, another F, NaN or
                infinity; no expert is live.
        """
        target_k = self.target_k if target_k is None else target_k
        features = self.prototypes.shape[1]
        if hidden_states.shape[-1:] != (features,) or not hidden_states.numel():
            raise ValueError(f"hidden_states must be one token at least, of shape (..., {features}), got {tuple(hidden_states.shape)}.")
        x = hidden_states.reshape(-1, features).float()
        if bad := int((~x.isfinite()).any(-1).sum()):
            raise ValueError(f"hidden_states must be finite, got NaN or infinity in {bad} of {len(x)} tokens.")
        live = int(self.expert_mask.sum())
        if not live:
            raise ValueError("expert_mask masks out every expert.")
        self._check_target(target_k, live)
        scores = torch.where(self.expert_mask, plain_scores(self, x), -torch.inf)
        if self.price is not None:
            self.pending.zero_()
            place = torch.tensor(min(max(len(x) * target_k / live - 0.5, 0), len(x) - 1), device=x.device)
            for _ in range(4 if self.level else 1):  # a token's own level depends on the thresholds
                level = self.level * own_level(scores - self.thresholds, self._rank) if self.level else 0
                quantiles = between((scores - level).T.sort(descending=True).values, place)
                self.thresholds.copy_(torch.where(self.expert_mask, quantiles, self.thresholds))
            scores = scores - self.thresholds
        if self.level:
            scores = scores - self.level * own_level(scores, self._rank)
        if self.head is not None:
            scores = scores + self.demand * self.spread.clamp(min=FLOOR) * self.head(x).unsqueeze(-1)

        def mean(limit: float) -> float:
            return mean_experts(self, scores > limit)

        bounded = self.form != "linear" and self.price is None
        reach = 1.0 if bounded else float(scores[scores.isfinite()].abs().max()) + 1.0
        # Where max_experts holds the mean at the target, any lower limit gives it too; this finds the highest.
        if target_k >= live and self.form != "cosine":
            limit = -reach
        else:
            limit = bisect(mean, target_k * 0.999 if target_k >= self.max_experts else target_k, -reach, reach)
        if self.price is not None:
            self.price.fill_(limit)
            return mean(self.price.item())
        if self.form == "cosine" and limit <= 0:
            raise ValueError(
                f"target_k must be at most {mean(0.0):.2f} here with form='cosine', whose thresholds are cosines above 0, got {target_k:g}."
            )
        # σ(s G) = σ(s cos) and σ(G) = cos.
        inside = min(max(limit, 1e-4), 1 - 1e-4)
        own = 1 - self.level  # a common threshold raises a token's own level too
        self.thresholds.fill_(math.log(inside / (1 - inside)) if self.form == "cosine" else limit / own if own else 0.0)
        stored = self.thresholds[0].float()  # half precision rounds it
        return mean(stored.sigmoid().item() if self.form == "cosine" else own * stored.item())

    @property
    def _rank(self) -> int:
        return max(1, round(self.target_k))

    @property
    def follows_scores(self) -> bool:
        """Whether thresholds move with the scores in training. Those of a router whose prototypes are frozen stay as they are."""
        return self.price is not None and self.prototypes.requires_grad

    @torch.no_grad()
    def place_expert(self, expert: int, prototype: Tensor, threshold: Tensor) -> None:
        """Makes an expert live, with a new prototype and threshold. In place, so compiled graphs stay valid.

        Args:
            expert: its index.
            prototype: (F,).
            threshold: 0-d; of `thresholds`, so without the price.
        """
        set_row(self.prototypes, expert, prototype)
        set_row(self.thresholds, expert, threshold)
        self.expert_mask[expert] = True
        if self.price is not None:
            # What the expert before it recorded does not count: its share was fair, or its quantile is this threshold.
            self.pending[expert] = 0 if self.thresholds_kind == "balanced" else threshold * self.pending[-1]

    def apply_recorded(self) -> None:
        """Moves running thresholds and the price by what was recorded before the last backward; nothing for learned thresholds, and nothing
        while an earlier forward waits for its backward, which may have to choose the same experts again. Warns, once, if one waits for a
        hundred calls.
        """
        if not self.follows_scores:
            return
        if torch.compiler.is_compiling() or not self.graphs.is_blocked():
            assert self.price is not None
            balanced = self.thresholds_kind == "balanced"
            if self.head is not None:
                head = self.head
                ready = is_ready(self.pending, self.era)
                apply_demand(head.head, head.centre, head.moments, head.pending, self.updates, ready, DECAY)
            apply_thresholds(self.thresholds, self.price, self.spread, self.pending, self.updates, self.era, balanced)

    def record(self, hidden_states: Tensor, routing: Routing, token_mask: Tensor | None = None) -> Routing:
        """Records the scores of a call for running thresholds; nothing for learned thresholds.

        Args:
            hidden_states: (N, F), of the call.
            routing: its result.
            token_mask: (N,) bool, True for tokens that count; None for all. Tokens with NaN never count.

        Returns:
            The routing to use from here on: its backward is what `apply_recorded` waits for.
        """
        if not self.follows_scores:
            return routing
        with torch.no_grad():
            balanced = self.thresholds_kind == "balanced"
            if self.form == "linear":
                scores = routing.scores.detach() + self.thresholds + self._token_thresholds(hidden_states).unsqueeze(-1)
            else:
                scores = plain_scores(self, hidden_states)
            kept = ~scores.isnan().any(-1)
            if token_mask is not None:
                kept = kept & token_mask
            state = (self.expert_mask, self.thresholds, self._token_thresholds(hidden_states), self.pending)
            record_scores(scores, routing.top_k_index, kept, *state, self.target_k, self.max_experts, balanced)
            if self.head is not None:
                record_demand(hidden_states.detach(), kept, self.head.pending)
        weights = routing.top_k_weights
        if not weights.requires_grad:
            return routing
        place = -1 if self.head is None else self.head.place
        watched = watched_weights(weights, hidden_states.detach(), kept, place)
        if not torch.compiler.is_compiling() and watched.grad_fn is not None:
            self.graphs.watch(watched)
        return routing._replace(top_k_weights=watched)

    def _token_thresholds(self, hidden_states: Tensor) -> Tensor:
        """(N,), the price minus what tokens of more predicted surprise are allowed."""
        assert self.price is not None
        price = self.price.expand(hidden_states.shape[0])
        return price if self.head is None else price - self.demand * self.spread.clamp(min=FLOOR) * self.head(hidden_states)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Names the other kind of thresholds instead of its keys."""
        if prefix + "thresholds" in state_dict and (prefix + "price" in state_dict) != (self.price is not None):
            other = "thresholds='learned'" if self.price is not None else "running thresholds"
            errors.append(
                f"{prefix.rstrip('.') or 'router'} was saved with {other}, but this one has thresholds={self.thresholds_kind!r}; make it "
                "with the options it was saved with."
            )
            return
        pending = state_dict.get(prefix + "pending")
        if (
            self.price is not None
            and pending is not None
            and pending.shape != self.pending.shape
            and len(self.thresholds) == len(state_dict[prefix + "thresholds"])
        ):
            kinds = ("balanced", "quantile") if len(pending) > len(self.pending) else ("quantile", "balanced")
            errors.append(f"{prefix.rstrip('.') or 'router'} was saved with thresholds={kinds[0]!r}, but this one has {kinds[1]!r}.")
            return
        if self.price is not None and (prefix + "head.head" in state_dict) != (self.head is not None):
            saved, own = ("above 0", "0") if self.head is None else ("0", "above 0")
            errors.append(f"{prefix.rstrip('.') or 'router'} was saved with demand {saved}, but this one has demand {own}.")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, hidden_states: Tensor, surprise_budget: Budget | None = None) -> Routing:
        """Routing of N tokens, (N, F): by threshold, or with a budget, a number or (N,), by share of softmax mass."""
        combine: Any = "uniform" if self.combine == "unit" else self.combine
        thresholds, of_tokens = self.thresholds, None
        if self.price is not None and self.form == "linear":
            of_tokens = self._token_thresholds(hidden_states)
        elif self.price is not None:
            thresholds = thresholds + self.price
        routing = threshold_route(
            hidden_states, self.prototypes, thresholds, form=self.form, scale=self.scale, min_experts=self.min_experts,
            max_experts=self.max_experts, combine=combine, expert_mask=self.expert_mask, level=self.level, level_rank=self._rank,
            token_thresholds=of_tokens,
        )  # fmt: skip
        if surprise_budget is not None:
            routing = select_by_budget(routing.scores, surprise_budget, max_experts=self.max_experts, combine=combine)
        match self.combine:
            case "unit":  # equal shares are 1 / count; the product undoes the division, also in the gradient
                return routing._replace(top_k_weights=routing.top_k_weights * routing.count.unsqueeze(-1))
            case "sigmoid":
                return routing._replace(top_k_weights=routing.top_k_weights * (2 / self.target_k))
        return routing

    def extra_repr(self) -> str:
        experts, features = self.prototypes.shape
        kinds = f"thresholds={self.thresholds_kind}, form={self.form}, combine={self.combine}"
        return f"hidden_size={features}, num_experts={experts}, target_k={self.target_k:g}, max_experts={self.max_experts}, {kinds}"


def plain_scores(router: ThresholdRouter, hidden_states: Tensor) -> Tensor:
    """(N, E) float32 or float64, what thresholds are compared with: the product of form="linear", the cosine for the other forms."""
    form: Form = "linear" if router.form == "linear" else "cosine"
    return router_logits(hidden_states, router.prototypes, form, 1.0)


def cosines(router: ThresholdRouter, hidden_states: Tensor) -> Tensor:
    """(N, E) float32, of tokens (N, F) and prototypes."""
    return unit_vectors(hidden_states.float()) @ unit_vectors(router.prototypes.float()).T


def mean_experts(router: ThresholdRouter, passed: Tensor) -> float:
    """Mean number of experts per token, of the thresholds that each token passed, (N, E) bool."""
    return passed.sum(-1).clamp(router.min_experts, router.max_experts).float().mean().item()
