"""Mixture of many small experts, chosen by a learned threshold: a drop-in replacement for an MLP.

N tokens, F features, E experts at most, I neurons per expert, K = max_experts slots per token
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Routing, expert_mlp
from ..ops._checks import check_choice, check_flag, check_number, check_size
from ..ops._dispatch import autocast_dtype
from ..ops.experts.expert_mlp import Activation, SurpriseKind
from ..ops.experts.threshold_route import Form
from .routed import GatingLoss, Routed, RoutingKind, reset_rows
from .surprise_budget import Budget
from .threshold_router import Combine, Thresholds


class DynMoE(Routed):
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

    surprise_kind: SurpriseKind

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
        super().__init__(
            hidden_size, num_experts, max_num_experts, target_k=target_k, routing=routing, surprise_budget=surprise_budget,
            gating_loss=gating_loss, surprise_kind=surprise_kind, thresholds=thresholds, form=form, scale=scale, min_experts=min_experts,
            max_experts=max_experts, combine=combine, level=level, demand=demand, device=device, dtype=dtype,
        )  # fmt: skip
        for name, value, kind in (("surprise_kind", surprise_kind, SurpriseKind), ("activation", activation, Activation)):
            check_choice(name, value, get_args(kind))
        for name, flag in (("gated", gated), ("bias", bias), ("output_bias", output_bias), ("checkpoint", checkpoint)):
            check_flag(name, flag)
        check_size("intermediate_size", intermediate_size)
        check_number("dropout", dropout, at_least=0, below=1)
        self.activation, self.gated, self.checkpoint = activation, gated, checkpoint
        width = 2 * intermediate_size if gated else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(len(self.expert_counts), *shape, device=device, dtype=dtype))

        self.gate_up_proj, self.down_proj = parameter(width, hidden_size), parameter(hidden_size, intermediate_size)
        self.gate_up_bias = parameter(width) if bias else None
        self.down_bias = parameter(hidden_size) if bias else None
        self.output_bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if output_bias else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises experts like `nn.Linear`, and the router by its own `reset_parameters`."""
        self.router.reset_parameters()
        self.reset_experts()
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)
        self.reset_statistics()

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters(recurse=False) if name != "output_bias"}

    @torch.no_grad()
    def reset_experts(self, experts: Tensor | None = None) -> None:
        for weight, bias in ((self.gate_up_proj, self.gate_up_bias), (self.down_proj, self.down_bias)):
            reset_rows(weight, weight.shape[-1], experts)
            if bias is not None:
                reset_rows(bias, weight.shape[-1], experts)

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
        tokens, routing, probe = self._routed(hidden_states, surprise_budget, token_mask)
        if self.checkpoint and torch.is_grad_enabled() and not self._transformed():
            out = checkpoint(self.execute, tokens, routing, probe, use_reentrant=False)
            assert isinstance(out, Tensor)
        else:
            out = self.execute(tokens, routing, probe)
        if self.output_bias is not None:
            out = out + self.output_bias.to(out.dtype)
        return self.dropout(out).view(hidden_states.shape)

    def extra_repr(self) -> str:
        experts, features, neurons = self.down_proj.shape
        return (
            f"hidden_size={features}, intermediate_size={neurons}, num_experts={experts}, {self._routing_repr()}, "
            f"activation={self.activation}, gated={self.gated}"
        )
