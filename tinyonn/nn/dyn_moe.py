"""Mixture of any number of tiny experts, chosen by a learnable threshold: the router, and a drop-in for an MLP.

N tokens, F features, E experts at most, I neurons of an expert, K = max_experts slots of a token
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Routing, expert_mlp, scatter_surprise, select_by_budget, sparse_diversity_loss, surprise_min_loss, threshold_route
from ..ops.expert_mlp import Activation, SurpriseKind
from ..ops.threshold_route import Combine as SharedCombine
from ..ops.threshold_route import Form
from .surprise_capture import probe_for

Combine = SharedCombine | Literal["unit"]
GatingLoss = Literal["surprise", "sdl", "both"]
RoutingKind = Literal["threshold", "budget"]


class ThresholdRouter(nn.Module):
    """Prototypes and thresholds: a token goes to the experts whose prototype it resembles more than their threshold asks.

    Starts where a token of random direction passes `target_k` thresholds on average; `calibrate` does so for real tokens.

    Args:
        hidden_size: F.
        num_experts: E.
        target_k: experts of a token to start with, between min_experts and max_experts.
        num_live: experts in use, the first ones; None for all. `expert_mask` says which are, and is saved.
        form, scale, min_experts, max_experts: see `ops.threshold_route`.
        combine: the kinds of `ops.threshold_route`, or "unit": weight 1 for each active expert, with the gradient of "uniform"
            (straight-through). Experts that are pieces of one MLP add up to it.
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
        if not 1 <= num_live <= num_experts:
            raise ValueError(f"num_live must be 1 … {num_experts}, got {num_live}.")
        if not 0 <= min_experts <= max_experts or max_experts < 1:
            raise ValueError(f"max_experts must be at least 1 and at least min_experts, got {max_experts} and {min_experts}.")
        if not max(min_experts, 1e-6) <= target_k <= min(max_experts, num_live):
            raise ValueError(f"target_k must be {min_experts} … {min(max_experts, num_live)}, got {target_k}.")
        self.target_k, self.num_live, self.form, self.scale = target_k, num_live, form, scale
        self.min_experts, self.max_experts, self.combine = min_experts, max_experts, combine
        self.prototypes = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.thresholds = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.register_buffer("expert_mask", torch.empty(num_experts, device=device, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.prototypes.normal_(std=self.prototypes.shape[1] ** -0.5)
            self.expert_mask.copy_(torch.arange(len(self.expert_mask)) < self.num_live)
            if self.thresholds.is_meta:
                return
            # Cosines of random directions: what is calibrated on them holds for any width, clipping to K and a lower bound included.
            generator = torch.Generator().manual_seed(0)
            sample = torch.randn(1024, self.prototypes.shape[1], generator=generator)
            self.calibrate(sample.to(self.prototypes.device))

    @torch.no_grad()
    def calibrate(self, hidden_states: Tensor, target_k: float | None = None) -> float:
        """Sets all thresholds to one cosine at which these tokens go to `target_k` experts on average.

        Args:
            hidden_states: (..., F).
            target_k: None for the router's own.

        Returns:
            The mean number of experts reached.

        Raises:
            ValueError: form="cosine" cannot send tokens to so many.
        """
        target_k = self.target_k if target_k is None else target_k
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
        cosine = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.prototypes.float(), dim=-1).T
        cosine = torch.where(self.expert_mask, cosine, -torch.inf)
        low, high = -1.0, 1.0

        def mean(limit: float) -> float:
            return (cosine > limit).sum(-1).clamp(self.min_experts, self.max_experts).float().mean().item()

        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) > target_k else (low, middle)
        if self.form == "cosine" and high <= 0:
            raise ValueError(
                f"target_k must be at most {mean(0.0):.2f} here with form='cosine', whose thresholds are cosines above 0, got {target_k:g}."
            )
        # σ(s G) = σ(s cos) and σ(G) = cos.
        inside = min(max(high, 1e-4), 1 - 1e-4)
        self.thresholds.fill_(high if self.form == "sigmoid_cosine" else math.log(inside / (1 - inside)))
        return mean(high)

    def forward(self, hidden_states: Tensor) -> Routing:
        """(N, F) -> Routing of N tokens."""
        routing = threshold_route(
            hidden_states, self.prototypes, self.thresholds, form=self.form, scale=self.scale, min_experts=self.min_experts,
            max_experts=self.max_experts, combine="uniform" if self.combine == "unit" else self.combine, expert_mask=self.expert_mask,
        )  # fmt: skip
        if self.combine != "unit":
            return routing
        # Equal shares are 1 / count: this takes the division back, in the gradient too.
        return routing._replace(top_k_weights=routing.top_k_weights * routing.count.unsqueeze(-1))

    def extra_repr(self) -> str:
        experts, features = self.prototypes.shape
        return f"hidden_size={features}, num_experts={experts}, target_k={self.target_k:g}, max_experts={self.max_experts}"


@dataclass
class Visit:
    """What one call of a mixture leaves behind for the router's loss.

    Attributes:
        hidden_states: (N, F), detached.
        routing: of the call.
        probe: (N, K), whose gradient after backward is the surprise.
        surprise_budget: what the call was given.
    """

    hidden_states: Tensor
    routing: Routing
    probe: Tensor
    surprise_budget: Tensor | float | None


class DynMoE(nn.Module):
    """A mixture of tiny experts in place of an MLP: (..., F) -> (..., F).

    `route` chooses experts and `execute` runs them. Only the second is ever recomputed under `checkpoint=True`, so a token can not go to
    another expert the second time.

    Within `capturing()` each call in which gradients are on is remembered, with a probe that backward fills with the surprise of every
    (token, expert) pair; `gating_loss` makes the router's loss of it, from scores computed once more on detached inputs, so that the
    graph of the main loss is not needed any more. `train.HyperStep` does all that.

    Args:
        hidden_size: F.
        intermediate_size: I, of one expert.
        num_experts: E, live at the start.
        max_num_experts: E, allocated; None for num_experts.
        target_k: experts of a token to start with, and of `sparse_diversity_loss`.
        routing: "threshold", or "budget": the smallest set of experts whose softmax mass reaches `surprise_budget`.
        surprise_budget: share of the mass, where the call does not say.
        gating_loss: "surprise", "sdl" or "both".
        surprise_kind, activation, gated: see `ops.expert_mlp`.
        bias: of the experts.
        output_bias: one more bias, (F,), which every token is given once, whatever its experts.
        dropout: of the output, in training.
        checkpoint: recompute the experts in backward.
        others: see `ThresholdRouter`.
    """

    expert_counts: Tensor
    tokens_seen: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        max_num_experts: int | None = None,
        target_k: float = 2.0,
        routing: RoutingKind = "threshold",
        surprise_budget: float = 0.5,
        gating_loss: GatingLoss = "surprise",
        surprise_kind: SurpriseKind = "down_proj",
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        output_bias: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
        form: Form = "sigmoid_cosine",
        scale: float = 1.0,
        min_experts: int = 1,
        max_experts: int = 8,
        combine: Combine = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("routing", routing, RoutingKind), ("gating_loss", gating_loss, GatingLoss)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
        max_num_experts = num_experts if max_num_experts is None else max_num_experts
        if max_num_experts < num_experts:
            raise ValueError(f"max_num_experts must be at least num_experts {num_experts}, got {max_num_experts}.")
        self.routing_kind, self.surprise_budget, self.gating_loss_kind = routing, surprise_budget, gating_loss
        self.surprise_kind, self.activation, self.gated, self.checkpoint = surprise_kind, activation, gated, checkpoint
        self.router = ThresholdRouter(
            hidden_size, max_num_experts, target_k, num_live=num_experts, form=form, scale=scale, min_experts=min_experts,
            max_experts=max_experts, combine=combine, device=device, dtype=dtype,
        )  # fmt: skip
        width = 2 * intermediate_size if gated else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(max_num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj, self.down_proj = parameter(width, hidden_size), parameter(hidden_size, intermediate_size)
        self.gate_up_bias = parameter(width) if bias else None
        self.down_bias = parameter(hidden_size) if bias else None
        self.output_bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if output_bias else None
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("expert_counts", torch.zeros(max_num_experts, device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("tokens_seen", torch.zeros((), device=device, dtype=torch.int64), persistent=False)
        self.visits: list[Visit] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts as `nn.Linear` starts them; the router as it starts itself."""
        self.router.reset_parameters()
        with torch.no_grad():
            for weight, bias in ((self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)):
                bound = weight.shape[-1] ** -0.5
                weight.uniform_(-bound, bound)
                if bias is not None:
                    bias.uniform_(-bound, bound)
            if self.output_bias is not None:
                self.output_bias.zero_()
        self.reset_statistics()

    def reset_statistics(self) -> None:
        self.expert_counts.zero_()
        self.tokens_seen.zero_()

    def statistics(self) -> dict[str, Any]:
        """Since the last reset: mean_k, experts of a token; dead_experts, live ones that no token went to; counts, (E,) tokens of each."""
        counts = self.expert_counts
        dead = int(((counts == 0) & self.router.expert_mask).sum())
        seen = int(self.tokens_seen)
        return {"mean_k": int(counts.sum()) / seen if seen else math.nan, "dead_experts": dead, "counts": counts.clone()}

    def route(self, hidden_states: Tensor, surprise_budget: Tensor | float | None = None) -> Routing:
        """Experts of each of N tokens, (N, F); `surprise_budget` is a number or (N,)."""
        routing: Routing = self.router(hidden_states)
        if self.routing_kind == "threshold":
            return routing
        budget = self.surprise_budget if surprise_budget is None else surprise_budget
        return select_by_budget(routing.scores, budget, max_experts=self.router.max_experts)

    def execute(self, hidden_states: Tensor, routing: Routing, surprise: Tensor | None = None) -> Tensor:
        """Runs the chosen experts: (N, F) -> (N, F). `surprise` is the probe of `ops.expert_mlp`."""
        device = hidden_states.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.down_proj.dtype
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (self.gate_up_bias, self.down_bias))
        return expert_mlp(
            hidden_states.to(dtype) if autocast else hidden_states, gate_up, down, routing.top_k_index, routing.top_k_weights,
            activation=self.activation, gate_up_bias=gate_up_bias, down_bias=down_bias, gated=self.gated, surprise=surprise,
            surprise_kind=self.surprise_kind,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, surprise_budget: Tensor | float | None = None) -> Tensor:
        """
        Args:
            hidden_states: (..., F).
            surprise_budget: for routing="budget", a number or one for each token, of the leading shape; None for the module's.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        budget = surprise_budget.reshape(-1) if isinstance(surprise_budget, Tensor) and surprise_budget.dim() else surprise_budget
        routing = self.route(tokens, budget)
        self._record(routing)
        probe = None if torch.compiler.is_compiling() else probe_for(self, routing.top_k_index, len(self.expert_counts), tokens.dtype)
        if self.visits is not None and torch.is_grad_enabled():
            if probe is None:
                wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
                probe = torch.zeros(routing.top_k_index.shape, dtype=wide, device=tokens.device, requires_grad=True)
            self.visits.append(Visit(tokens.detach(), routing, probe, budget))
        if self.checkpoint and torch.is_grad_enabled():
            out = checkpoint(self.execute, tokens, routing, probe, use_reentrant=False)
            assert isinstance(out, Tensor)
        else:
            out = self.execute(tokens, routing, probe)
        if self.output_bias is not None:
            out = out + self.output_bias.to(out.dtype)
        return self.dropout(out).view(hidden_states.shape)

    @torch.no_grad()
    def _record(self, routing: Routing) -> None:
        experts = len(self.expert_counts)
        flat = routing.top_k_index.flatten()
        added = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
        self.expert_counts += added[:experts]
        self.tokens_seen += len(routing.top_k_index)

    def capturing(self) -> AbstractContextManager[list[Visit]]:
        """Within it, calls are remembered in the list it gives; what was remembered is let go of at its end."""

        @contextmanager
        def capture() -> Any:
            if self.visits is not None:
                raise RuntimeError("a mixture must be captured by one context at a time, got a second.")
            self.visits = []
            try:
                yield self.visits
            finally:
                self.visits = None

        return capture()

    def surprise(self, visit: Visit) -> Tensor:
        """(N, E) surprise of a remembered call after backward, infinite where a token did not go."""
        if visit.probe.grad is None:
            raise RuntimeError("the surprise must come from a backward pass, got none since this call.")
        return scatter_surprise(visit.probe.grad, visit.routing.top_k_index, len(self.expert_counts))

    def gating_loss(
        self, visit: Visit, token_mask: Tensor | None = None, *, w_ce: float = 1.0, w_kl: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """The router's loss of a remembered call, 0-d: of prototypes and thresholds alone.

        Args:
            visit: after the backward of the main loss.
            token_mask: of the leading shape of the call's tokens, which of them count.
            w_ce, w_kl, temperature: see `ops.surprise_min_loss`.
        """
        mask = None if token_mask is None else token_mask.reshape(-1).bool()
        routing = self.route(visit.hidden_states, visit.surprise_budget)
        loss = routing.scores.new_zeros(())
        if self.gating_loss_kind in ("surprise", "both"):
            options = {"w_ce": w_ce, "w_kl": w_kl, "temperature": temperature}
            loss = loss + surprise_min_loss(routing.scores, self.surprise(visit), token_mask=mask, **options)
        if self.gating_loss_kind in ("sdl", "both"):
            count = routing.count if mask is None else routing.count[mask]
            if len(count):  # else a batch of padding alone
                live = self.router.prototypes[self.router.expert_mask]
                loss = loss + sparse_diversity_loss(live, count, self.router.target_k)
        return loss
