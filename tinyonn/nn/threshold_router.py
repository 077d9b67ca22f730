"""Router of a mixture: a prototype and a threshold for each expert.

N tokens, F features, E experts, K = max_experts slots per token
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import Routing, select_by_budget, threshold_route
from ..ops._checks import check_choice, check_number, check_size
from ..ops.experts.threshold_route import Combine as SharedCombine
from ..ops.experts.threshold_route import Form, unit_vectors
from ._search import bisect
from .surprise_budget import Budget

Combine = SharedCombine | Literal["unit"]


class ThresholdRouter(nn.Module):
    """Router with a prototype and a threshold per expert: a token uses the experts whose similarity exceeds their threshold.

    At the start, tokens of random direction pass `target_k` thresholds on average; `calibrate` sets thresholds for real tokens.

    Args:
        hidden_size: F.
        num_experts: E.
        target_k: mean number of experts per token at the start, between min_experts and max_experts.
        num_live: number of experts in use, the first ones; None for all. The buffer `expert_mask` marks them and is saved.
        form, scale, min_experts, max_experts: see `ops.threshold_route`.
        combine: a kind of `ops.threshold_route`, or "unit": weight 1 for each active expert, with the gradient of "uniform"
            (straight-through). Use it if the experts are parts of one MLP, which their sum equals.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    expert_mask: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        target_k: float,
        *,
        num_live: int | None = None,
        form: Form = "sigmoid_cosine",
        scale: float = 1.0,
        min_experts: int = 1,
        max_experts: int = 8,
        combine: Combine = "softmax",
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
        check_choice("form", form, get_args(Form))
        check_choice("combine", combine, (*get_args(SharedCombine), "unit"))
        check_number("scale", scale, above=0)
        self.target_k, self.num_live, self.form, self.scale = target_k, num_live, form, scale
        self.min_experts, self.max_experts, self.combine = min_experts, max_experts, combine
        self._check_target(target_k, num_live)
        self.prototypes = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.thresholds = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
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
            if self.thresholds.is_meta:
                return
            # Calibration on random directions holds for any width, and includes clipping to K and to min_experts.
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(1024, self.prototypes.shape[1], generator=generator, device="cpu")
            self.calibrate(sample.to(self.prototypes.device))

    @torch.no_grad()
    def calibrate(self, hidden_states: Tensor, target_k: float | None = None) -> float:
        """Sets all thresholds to one cosine at which these tokens use `target_k` experts on average.

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
        cosine = torch.where(self.expert_mask, cosines(self, x), -torch.inf)

        def mean(limit: float) -> float:
            return mean_experts(self, cosine > limit)

        limit = bisect(mean, target_k, -1.0, 1.0)
        if self.form == "cosine" and limit <= 0:
            raise ValueError(
                f"target_k must be at most {mean(0.0):.2f} here with form='cosine', whose thresholds are cosines above 0, got {target_k:g}."
            )
        # σ(s G) = σ(s cos) and σ(G) = cos.
        inside = min(max(limit, 1e-4), 1 - 1e-4)
        self.thresholds.fill_(limit if self.form == "sigmoid_cosine" else math.log(inside / (1 - inside)))
        stored = self.thresholds[0].float()  # half precision rounds it
        return mean((stored if self.form == "sigmoid_cosine" else stored.sigmoid()).item())

    def forward(self, hidden_states: Tensor, surprise_budget: Budget | None = None) -> Routing:
        """Routing of N tokens, (N, F): by threshold, or with a budget, a number or (N,), by share of softmax mass."""
        combine: SharedCombine = "uniform" if self.combine == "unit" else self.combine
        routing = threshold_route(
            hidden_states, self.prototypes, self.thresholds, form=self.form, scale=self.scale, min_experts=self.min_experts,
            max_experts=self.max_experts, combine=combine, expert_mask=self.expert_mask,
        )  # fmt: skip
        if surprise_budget is not None:
            routing = select_by_budget(routing.scores, surprise_budget, max_experts=self.max_experts, combine=combine)
        if self.combine != "unit":
            return routing
        # Equal shares are 1 / count; the product undoes the division, also in the gradient.
        return routing._replace(top_k_weights=routing.top_k_weights * routing.count.unsqueeze(-1))

    def extra_repr(self) -> str:
        experts, features = self.prototypes.shape
        return f"hidden_size={features}, num_experts={experts}, target_k={self.target_k:g}, max_experts={self.max_experts}"


def cosines(router: ThresholdRouter, hidden_states: Tensor) -> Tensor:
    """(N, E) float32, of tokens (N, F) and prototypes."""
    return unit_vectors(hidden_states.float()) @ unit_vectors(router.prototypes.float()).T


def mean_experts(router: ThresholdRouter, passed: Tensor) -> float:
    """Mean number of experts per token, of the thresholds that each token passed, (N, E) bool."""
    return passed.sum(-1).clamp(router.min_experts, router.max_experts).float().mean().item()
