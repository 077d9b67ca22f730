"""What the layers with routed experts share: the router, running counts, capturing of surprise, and the router's own loss.

N tokens, F features, E experts at most, K = max_experts slots per token
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..ops import Routing, scatter_surprise, sparse_diversity_loss
from ..ops._checks import check_choice, check_number, check_size
from ..ops.experts.threshold_route import Form
from ._surrounding import Surrounding
from .dead_experts import Watch, warn_of_dead_experts
from .expert_life import ExpertLife
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


def reset_rows(parameter: nn.Parameter, fan_in: int, experts: Tensor | None) -> None:
    """Draws (E, ...) values, or those of some experts, as `nn.Linear` with this many inputs does."""
    bound = fan_in**-0.5
    if experts is None:
        parameter.uniform_(-bound, bound)
    else:
        parameter[experts] = parameter.new_empty(len(experts), *parameter.shape[1:]).uniform_(-bound, bound)


class RoutedCall(NamedTuple):
    """Routing of one call, and its probe.

    Attributes:
        tokens: (N, F).
        routing: experts and weights of each token.
        probe: (N, K) zeros whose gradient after backward is the surprise; None unless the call is captured.
    """

    tokens: Tensor
    routing: Routing
    probe: Tensor | None


class Routed(nn.Module):
    """Base of layers whose tokens choose experts: `DynMoE` and `DynSMHA`.

    `capturing()` collects each call in which gradients are on, with a probe that backward fills with the surprise of every (token, expert)
    pair. `gating_loss` computes the router's loss from it. The router's scores are computed again on detached inputs, so the graph of the
    main loss is not needed. `train.HyperStep` does all of this.

    A subclass has parameters of E experts in their first dimension, named by `expert_parameters`, and calls `_routed` in its forward.

    Args:
        hidden_size: F.
        num_experts: experts that are live at the start.
        max_num_experts: E, the number of allocated experts; None for num_experts.
        others: see `DynMoE`.
    """

    expert_counts: Tensor
    tokens_seen: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        max_num_experts: int | None,
        *,
        target_k: float | None,
        routing: RoutingKind,
        surprise_budget: float | None,
        gating_loss: GatingLoss | None,
        surprise_kind: str,
        thresholds: Thresholds | None,
        form: Form | None,
        scale: float,
        min_experts: int,
        max_experts: int | None,
        combine: Combine | None,
        level: float | None,
        demand: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
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
        check_choice("gating_loss", gating_loss, get_args(GatingLoss))
        max_num_experts = num_experts if max_num_experts is None else max_num_experts
        for name, size in (("num_experts", num_experts), ("max_num_experts", max_num_experts)):
            check_size(name, size)
        if max_num_experts < num_experts:
            raise ValueError(f"max_num_experts must be at least num_experts {num_experts}, got {max_num_experts}.")
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
        self.surprise_kind = surprise_kind
        self.surrounding_budget = Surrounding() if routing == "budget" else None
        self.surrounding_mask = Surrounding()
        self.watch = Watch()
        self.life: ExpertLife | None = None
        target_k = min(2, num_experts) if target_k is None else target_k
        check_number("target_k", target_k)
        if max_experts is None:
            slots = math.ceil((2 if thresholds == "learned" else 4) * target_k)
            max_experts = max_num_experts if routing == "budget" else min(max_num_experts, max(8, slots, min_experts))
        self.router = ThresholdRouter(
            hidden_size, max_num_experts, target_k, num_live=num_experts, thresholds=thresholds, form=form, scale=scale,
            min_experts=min_experts, max_experts=max_experts, combine=combine, level=level, demand=demand, device=device, dtype=dtype,
        )  # fmt: skip
        self.register_buffer("expert_counts", torch.zeros(max_num_experts, device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("tokens_seen", torch.zeros((), device=device, dtype=torch.int64), persistent=False)
        self._unset = self.expert_counts.is_meta  # whether buffers that no file holds may have any value, once they have one

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the experts by name, each (E, ...)."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_experts(self, experts: Tensor | None = None) -> None:
        """Draws new weights, as at the start, for all experts or for some of them, (n,) indices.

        It takes the number of experts from the parameters alone: `fresh_experts` calls it on others, of fewer experts.
        """
        raise NotImplementedError

    def track_life(self) -> ExpertLife:
        """Records, from here on, what each expert does over its life, in the submodule `life`; `train.ExpertLifecycle` does this."""
        if self.life is None:
            self.life = ExpertLife(len(self.expert_counts), self.router.prototypes.shape[1], self.expert_counts.device)
        return self.life

    @torch.no_grad()
    def fresh_experts(self, number: int, seed: int) -> dict[str, Tensor]:
        """New weights for some experts, as `reset_experts` draws them, by name of `expert_parameters`.

        Returns:
            (number, ...) on the CPU, in float32, or float64 for float64 parameters; they depend on the seed alone.
        """
        found = {}
        owners = {name: (self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.expert_parameters()}
        kept = self.expert_parameters()
        try:
            for name, (owner, last) in owners.items():
                dtype = torch.float64 if kept[name].dtype == torch.float64 else torch.float32
                empty = torch.full((number, *kept[name].shape[1:]), torch.nan, dtype=dtype, device="cpu")
                owner._parameters[last] = found[name] = nn.Parameter(empty, requires_grad=False)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.reset_experts(torch.arange(number, device="cpu"))
        finally:
            for name, (owner, last) in owners.items():
                owner._parameters[last] = kept[name]
        return {name: parameter.data for name, parameter in found.items()}

    def _set_buffers(self) -> None:
        """Sets what no file holds, once, in a module that was made without data: `from_pretrained` leaves it as memory was."""
        if self._unset and not self.expert_counts.is_meta:
            self._unset = False
            self.reset_statistics()
            self.router.forget_era()

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

    def _routed(
        self, hidden_states: Tensor, surprise_budget: Budget | None, token_mask: Tensor | None, active: Tensor | None = None
    ) -> RoutedCall:
        """Routes the tokens of a call, (..., F), and counts them.

        Args:
            hidden_states, surprise_budget, token_mask: see `DynMoE.forward`.
            active: (N,) bool; other tokens get no expert. None for all.
        """
        self._set_buffers()
        shape = hidden_states.shape[:-1]
        budget = self._budget(surprise_budget, shape)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        learns = self.training and not self._transformed() and not torch.compiler.is_exporting()
        if learns:
            self.router.apply_recorded()
        routing = self.route(tokens, budget)
        mask = self._mask(token_mask, shape)
        if active is not None:
            index = torch.where(active.unsqueeze(-1), routing.top_k_index, self.expert_counts.shape[0])
            weights = torch.where(active.unsqueeze(-1), routing.top_k_weights, 0)
            routing = routing._replace(top_k_index=index, top_k_weights=weights)
            mask = active if mask is None else mask & active
        if learns:
            routing = self.router.record(tokens, routing, mask)
        count_experts(routing.top_k_index, routing.top_k_weights.detach(), mask, self.expert_counts, self.tokens_seen)
        if learns and self.life is not None:
            self.life.record(tokens, routing, mask)
        visit = (tokens, routing, budget, shape)
        probe = probe_for(self, routing.top_k_index, self.expert_counts.shape[0], tokens.dtype, visit, mask)
        return RoutedCall(tokens, routing, probe)

    @staticmethod
    def _transformed() -> bool:
        """Whether a transform of torch.func is active."""
        return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix + "life.") for key in state_dict):
            self.track_life()  # a submodule, which is loaded after this
        elif self.life is not None and prefix + "router.prototypes" in state_dict:
            self.life.reset()  # experts of a model whose life was not recorded
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _routing_repr(self) -> str:
        routed = self.routing_kind if self.surprise_budget is None else f"{self.routing_kind}, surprise_budget={self.surprise_budget:g}"
        return f"routing={routed}, gating_loss={self.gating_loss_kind}"


register_capturable(lambda module: isinstance(module, Routed))
