"""Mixture of many small experts, chosen by a learned threshold: a drop-in replacement for an MLP.

N tokens, F features, E experts at most, I neurons per expert, K = max_experts slots per token
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Routing, expert_mlp, scatter_surprise, sparse_diversity_loss
from ..ops._checks import check_choice, check_flag, check_number, check_size
from ..ops._dispatch import autocast_dtype
from ..ops.experts.expert_mlp import Activation, SurpriseKind
from ..ops.experts.threshold_route import Form
from ._surrounding import Surrounding
from .dead_experts import Watch, warn_of_dead_experts
from .expert_statistics import check_mask_shape, check_token_mask, count_experts
from .surprise_budget import Budget, budget_of_tokens, check_budget
from .surprise_capture import Visit, captured_calls, probe_for, register_capturable
from .surprise_loss import SurpriseLoss, surprise_loss_of
from .threshold_router import Combine, ThresholdRouter, Thresholds

GatingLoss = Literal["surprise", "sdl", "both", "none"]
RoutingKind = Literal["threshold", "budget"]
# Defaults that go with thresholds that gradients train, and with thresholds that follow the scores.
_LEARNED: dict[str, Any] = {"gating_loss": "both", "form": "sigmoid_cosine", "combine": "softmax", "level": 0.0, "demand": 0.0}
_RUNNING: dict[str, Any] = {"gating_loss": "none", "form": "linear", "combine": "softmax_logits", "level": 0.4, "demand": 0.25}
ONLY_BY_BUDGET = "surprise_budget must be left out unless routing='budget'"


class DynMoE(nn.Module):
    """A mixture of small experts in place of an MLP: (..., F) -> (..., F).

    `route` chooses experts and `execute` runs them. `checkpoint=True` recomputes only `execute`, so a token keeps its experts.

    `capturing()` collects each call in which gradients are on, with a probe that backward fills with the surprise of every (token, expert)
    pair. `gating_loss` computes the router's loss from it. The router's scores are computed again on detached inputs, so the graph of the
    main loss is not needed. `train.HyperStep` does all of this.

    Args:
        hidden_size: F.
        intermediate_size: I, of one expert.
        num_experts: experts that are live at the start.
        max_num_experts: E, the number of allocated experts; None for num_experts.
        target_k: mean number of experts per token at the start, and in `sparse_diversity_loss`; None for 2, or 1 if there is one expert.
        routing: "threshold", or "budget": the smallest set of experts whose softmax mass reaches `surprise_budget`.
            A budget always chooses at least one expert, so min_experts must be 1.
        surprise_budget: share of the mass with routing="budget", unless the call or `surprise_budget_of` sets another; above 0 and at
            most 1, None for 0.5.
        gating_loss: "both", "surprise", "sdl" (sparse diversity), or "none": the main loss alone trains the router. Surprise alone trains
            which experts a token uses, not how many: with learned thresholds their number drifts, usually up to max_experts. With the
            surprise kinds "down_proj" and "output" the loss does not depend on the labels (see `ops.surprise_min_loss`). None for "both"
            with thresholds="learned", else "none".
        surprise_kind, activation, gated: see `ops.expert_mlp`.
        bias: whether the experts have biases.
        output_bias: whether one more bias, (F,), is added to the output of every token, whatever its experts.
        dropout: dropout rate of the output, in training.
        checkpoint: whether to recompute the experts in backward; torch.func transforms ignore it, as they do not support it.
        thresholds: see `ThresholdRouter`; None for "balanced", or "learned" with routing="budget", a form of cosines, or a gating_loss that
            is not "none".
        form, combine, level, demand: see `ThresholdRouter`; None for "linear", "softmax_logits", 0.4 and 0.25, or with
            thresholds="learned" for "sigmoid_cosine", "softmax", 0 and 0. `level` and `demand` are 0 unless form is "linear".
        max_experts: K, slots per token; None for all experts with routing="budget", else for twice target_k, or four times with running
            thresholds, at least 8.
        others: see `ThresholdRouter`.

    Raises:
        TypeError, ValueError: an option has the wrong type, is out of range, or conflicts with another.
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
        target_k: float | None = None,
        routing: RoutingKind = "threshold",
        surprise_budget: float | None = None,
        gating_loss: GatingLoss | None = None,
        surprise_kind: SurpriseKind = "down_proj",
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        output_bias: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
        thresholds: Thresholds | None = None,
        form: Form | None = None,
        scale: float = 1.0,
        min_experts: int = 1,
        max_experts: int | None = None,
        combine: Combine | None = None,
        level: float | None = None,
        demand: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("routing", routing, get_args(RoutingKind))
        if thresholds is None:
            older = routing == "budget" or form in ("sigmoid_cosine", "cosine") or gating_loss in ("surprise", "sdl", "both")
            thresholds = "learned" if older else "balanced"
        rule = _LEARNED if thresholds == "learned" else _RUNNING
        gating_loss = rule["gating_loss"] if gating_loss is None else gating_loss
        form = rule["form"] if form is None else form
        combine = rule["combine"] if combine is None else combine
        linear = form == "linear"  # level and demand are for linear scores
        level = (rule["level"] if linear else 0.0) if level is None else level
        demand = (rule["demand"] if linear else 0.0) if demand is None else demand
        for name, value, kind in (
            ("gating_loss", gating_loss, GatingLoss), ("surprise_kind", surprise_kind, SurpriseKind),
            ("activation", activation, Activation),
        ):  # fmt: skip
            check_choice(name, value, get_args(kind))
        for name, flag in (("gated", gated), ("bias", bias), ("output_bias", output_bias), ("checkpoint", checkpoint)):
            check_flag(name, flag)
        max_num_experts = num_experts if max_num_experts is None else max_num_experts
        sizes = {"intermediate_size": intermediate_size, "num_experts": num_experts, "max_num_experts": max_num_experts}
        for name, size in sizes.items():
            check_size(name, size)
        if max_num_experts < num_experts:
            raise ValueError(f"max_num_experts must be at least num_experts {num_experts}, got {max_num_experts}.")
        check_number("dropout", dropout, at_least=0, below=1)
        check_size("min_experts", min_experts, 0)
        if routing == "budget":
            surprise_budget = 0.5 if surprise_budget is None else surprise_budget
            check_number("surprise_budget", surprise_budget)
            check_budget(surprise_budget)
            if min_experts != 1:
                raise ValueError(f"min_experts must be 1 with routing='budget', got {min_experts}.")
            for option, unfit in (("thresholds", thresholds), ("combine", combine)):
                if unfit in ("softmax_logits", "sigmoid", "relu", "quantile", "balanced"):
                    raise ValueError(f"{option} must not be {unfit!r} with routing='budget', whose shares sum to 1 and need no threshold.")
        elif surprise_budget is not None:
            raise ValueError(f"{ONLY_BY_BUDGET}, got {surprise_budget} with routing={routing!r}.")
        self.routing_kind, self.surprise_budget, self.gating_loss_kind = routing, surprise_budget, gating_loss
        self.surrounding_budget = Surrounding() if routing == "budget" else None
        self.surrounding_mask = Surrounding()
        self.watch = Watch()
        self.surprise_kind, self.activation, self.gated, self.checkpoint = surprise_kind, activation, gated, checkpoint
        target_k = min(2, num_experts) if target_k is None else target_k
        check_number("target_k", target_k)
        if max_experts is None:
            slots = math.ceil((2 if thresholds == "learned" else 4) * target_k)
            max_experts = max_num_experts if routing == "budget" else min(max_num_experts, max(8, slots, min_experts))
        self.router = ThresholdRouter(
            hidden_size, max_num_experts, target_k, num_live=num_experts, thresholds=thresholds, form=form, scale=scale,
            min_experts=min_experts, max_experts=max_experts, combine=combine, level=level, demand=demand, device=device, dtype=dtype,
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
        self._unset = self.expert_counts.is_meta  # whether buffers that no file holds may have any value, once they have one
        self.reset_parameters()

    def _set_buffers(self) -> None:
        """Sets what no file holds, once, in a module that was made without data: `from_pretrained` leaves it as memory was."""
        if self._unset and not self.expert_counts.is_meta:
            self._unset = False
            self.reset_statistics()
            self.router.forget_era()

    def reset_parameters(self) -> None:
        """Initialises experts like `nn.Linear`, and the router by its own `reset_parameters`."""
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
        self.watch.last = None

    def statistics(self) -> dict[str, Any]:
        """Statistics since the last reset: mean_k, experts per token; dead_experts, live experts without a token; counts, (E,) tokens.

        A token counts once, even if a checkpointed layer runs again in backward. Tokens outside a `token_mask`, from the call or from a
        surrounding `token_mask_of`, and tokens with NaN are not counted. Before the first counted token mean_k and dead_experts are NaN.

        Warns once, as `train.HyperStep` does, if live experts got none of the last 1,000 · E / target_k tokens or more.
        """
        self._set_buffers()
        warn_of_dead_experts({"": self})
        counts = self.expert_counts
        found = {"mean_k": math.nan, "dead_experts": math.nan, "counts": counts.clone()}
        if seen := int(self.tokens_seen):
            found |= {"mean_k": int(counts.sum()) / seen, "dead_experts": int(((counts == 0) & self.router.expert_mask).sum())}
        return found

    def route(self, hidden_states: Tensor, surprise_budget: Budget | None = None) -> Routing:
        """Routing of N tokens, (N, F), to experts. `surprise_budget` is a number, 0-d or (N,); see `forward`."""
        return self.router(hidden_states, self._budget(surprise_budget, hidden_states.shape[:-1]))

    def _budget(self, surprise_budget: Budget | None, shape: torch.Size) -> Budget | None:
        """Budget of a call on tokens of this leading shape: its own, else the surrounding one, else the module's; None for a threshold."""
        if surprise_budget is not None:
            check_budget(surprise_budget)
        if self.surrounding_budget is None:
            if surprise_budget is not None:
                raise ValueError(f"{ONLY_BY_BUDGET}, got one with routing={self.routing_kind!r}.")
            return None
        for budget in (surprise_budget, self.surrounding_budget.value, self.surprise_budget):
            if budget is not None:
                return budget_of_tokens(budget, shape)
        raise AssertionError("a mixture that routes by budget has one")

    def execute(self, hidden_states: Tensor, routing: Routing, surprise: Tensor | None = None) -> Tensor:
        """Runs the chosen experts: (N, F) -> (N, F). `surprise` is the probe of `ops.expert_mlp`."""
        autocast = autocast_dtype(hidden_states)
        dtype = autocast or self.down_proj.dtype
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (self.gate_up_bias, self.down_bias))
        return expert_mlp(
            hidden_states.to(dtype) if autocast else hidden_states, gate_up, down, routing.top_k_index, routing.top_k_weights,
            activation=self.activation, gate_up_bias=gate_up_bias, down_bias=down_bias, gated=self.gated, surprise=surprise,
            surprise_kind=self.surprise_kind,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, surprise_budget: Budget | None = None, token_mask: Tensor | None = None) -> Tensor:
        """The mixture's output. A token that contains NaN or infinity yields NaN and does not affect other tokens.

        Args:
            hidden_states: (..., F).
            surprise_budget: budget for routing="budget", above 0 and at most 1: a number, 0-d, or of the leading shape, in which a size
                may be 1. None for the budget of a surrounding `surprise_budget_of`, or the module's.
            token_mask: bool or integers, of the leading shape; which tokens `statistics` counts, such as an attention mask. None for the
                mask of a surrounding `token_mask_of`, or all tokens. The output does not depend on it.

        Returns:
            (..., F), in the dtype of the experts or of autocast.

        Raises:
            TypeError, ValueError: hidden_states is not a tensor or has another F; the budget or the mask has the wrong type or shape; a
                budget is given but tokens are routed by threshold.
        """
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states must be a tensor, got {type(hidden_states).__name__}.")
        features = self.down_proj.shape[1]
        if hidden_states.shape[-1:] != (features,):
            raise ValueError(f"hidden_states must have shape (..., {features}), got {tuple(hidden_states.shape)}.")
        if hidden_states.dtype != self.down_proj.dtype and autocast_dtype(hidden_states) is None:
            raise TypeError(
                f"hidden_states must be {self.down_proj.dtype} like the experts, or come under autocast, got {hidden_states.dtype}."
            )
        self._set_buffers()
        budget = self._budget(surprise_budget, hidden_states.shape[:-1])
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        learns = self.training and not transformed and not torch.compiler.is_exporting()
        if learns:
            self.router.apply_recorded()
        routing = self.route(tokens, budget)
        mask = self._mask(token_mask, hidden_states.shape[:-1])
        if learns:
            routing = self.router.record(tokens, routing, mask)
        count_experts(routing.top_k_index, routing.top_k_weights.detach(), mask, self.expert_counts, self.tokens_seen)
        visit = (tokens, routing, budget, hidden_states.shape[:-1])
        probe = probe_for(self, routing.top_k_index, self.expert_counts.shape[0], tokens.dtype, visit)
        if self.checkpoint and torch.is_grad_enabled() and not transformed:
            out = checkpoint(self.execute, tokens, routing, probe, use_reentrant=False)
            assert isinstance(out, Tensor)
        else:
            out = self.execute(tokens, routing, probe)
        if self.output_bias is not None:
            out = out + self.output_bias.to(out.dtype)
        return self.dropout(out).view(hidden_states.shape)

    def _mask(self, token_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Mask of the counted tokens of a call, (N,) bool; None for all."""
        if token_mask is not None:
            check_token_mask(token_mask)
        else:
            token_mask = self.surrounding_mask.value
        if token_mask is None:
            return None
        check_mask_shape(token_mask, shape)
        return token_mask.reshape(-1).to(self.expert_counts.device) != 0

    @contextmanager
    def capturing(self) -> Iterator[list[Visit]]:
        """A list of the calls within the block in which gradients are on. RuntimeError if the layer is captured already."""
        with captured_calls([self], "router_inputs") as visits:
            yield visits[self]

    def surprise(self, visit: Visit) -> Tensor:
        """Surprise of a captured call after backward, (N, E), infinite for experts that did not see the token."""
        if visit.probe.grad is None:
            raise RuntimeError("backward has not reached this call, so it has no surprise yet.")
        return scatter_surprise(visit.probe.grad, visit.routing.top_k_index, self.expert_counts.shape[0])

    def gating_loss(
        self,
        visit: Visit,
        token_mask: Tensor | None = None,
        *,
        surprise_loss: SurpriseLoss | Mapping[str, Any] | None = None,
        w_ce: float | None = None,
        w_kl: float | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """The router's loss for a captured call, 0-d; it has gradients for prototypes and thresholds only.

        Args:
            visit: the call, after the backward of the main loss.
            token_mask: mask of the leading shape of the call's tokens; which of them count.
            surprise_loss: weights of the loss on surprise, a `SurpriseLoss` or a mapping of its numbers; None for its defaults.
            w_ce, w_kl, temperature: the numbers of `SurpriseLoss`, in place of `surprise_loss`; None for its defaults.

        Raises:
            TypeError: the mask is not of booleans or integers.
            ValueError: the mask has another shape.
            RuntimeError: backward has not reached the call.
        """
        weighted = surprise_loss_of(surprise_loss, w_ce=w_ce, w_kl=w_kl, temperature=temperature)
        number = len(visit.hidden_states)
        if token_mask is not None:
            check_token_mask(token_mask)
            check_mask_shape(token_mask, visit.shape)
        mask = None if token_mask is None else token_mask.reshape(-1).bool()
        # Zeros replace masked tokens: one that is not finite would make the gradient 0 · NaN.
        hidden_states = visit.hidden_states if mask is None else torch.where(mask.unsqueeze(-1), visit.hidden_states, 0)
        routing = self.route(hidden_states, visit.surprise_budget)
        loss = routing.scores[:0].sum()  # 0 with a graph, for a batch of padding alone
        if self.gating_loss_kind in ("surprise", "both"):
            loss = loss + weighted(routing.scores, self.surprise(visit), mask, saving=self.surprise_kind == "saving")
        if self.gating_loss_kind in ("sdl", "both") and number:
            masks = {"token_mask": mask, "expert_mask": self.router.expert_mask}
            loss = loss + sparse_diversity_loss(self.router.prototypes, routing.count, self.router.target_k, **masks)
        return loss

    def extra_repr(self) -> str:
        experts, features, neurons = self.down_proj.shape
        routed = self.routing_kind if self.surprise_budget is None else f"{self.routing_kind}, surprise_budget={self.surprise_budget:g}"
        return (
            f"hidden_size={features}, intermediate_size={neurons}, num_experts={experts}, routing={routed}, "
            f"gating_loss={self.gating_loss_kind}, activation={self.activation}, gated={self.gated}"
        )


register_capturable(lambda module: isinstance(module, DynMoE))
