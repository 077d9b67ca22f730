"""Attention heads as experts: a pool of single-head attentions, of which each token uses those whose threshold it passes.

    q, k, v = W_qkv[e] x_t                        for each pair of a token t and one of its heads e
    a_te    = softmax_j(q_te · k_je / √D) v_je    over j <= t that use head e too, at their rotary positions in the whole sequence
    out_t   = Σ_e w_te W_o[e] a_te

The pairs are sorted by head once. The projections are grouped products over them, and each head's pairs are one packed sequence.

B rows, T tokens, N = B * T, F features, E heads at most, K = max_experts slots per token, D head dim
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Routing, SlotOrder, expert_linear, sliding_window_attention, sort_slots
from ..ops._checks import check_choice, check_flag, check_number, check_size
from ..ops._dispatch import autocast_dtype
from ..ops.experts.threshold_route import Form
from ..ops.nsa._checks import check_bound_values, checked_bounds
from .dyn_smha_cache import DynSMHACache, Pairs
from .rotary import Turn, positions, rotate, rotation, sequence_numbers
from .routed import GatingLoss, Routed, RoutingKind, reset_rows
from .surprise_budget import Budget
from .threshold_router import Combine, Thresholds

Mode = Literal["per_head", "composite"]
HeadSurprise = Literal["o_proj", "head"]


class DynSMHA(Routed):
    """Causal self-attention with any number of heads per token: (B, T, F) -> (B, T, F).

    `num_experts` heads are live at the start, as for the experts of `DynMoE`, and the options of the router are the same. With padding or a
    cache, padded tokens use no head and give 0.

    Mode "per_head": a token attends, in each of its heads, to itself and the earlier tokens that use this head too. Arithmetic grows with
    the pairs of a token and a head, memory with the slots, `max_experts` a token. Mode "composite": the routing weights merge the heads of
    a token into one, Σ_e w_te W_qkv[e] x_t, which attends to all earlier tokens.

    `checkpoint=True` recomputes only `execute`, so a token keeps its heads; a call with a cache keeps everything. `capturing`,
    `gating_loss` and `train.HyperStep` work as for `DynMoE`. Transforms of torch.func are not supported.

    Args:
        hidden_size: F.
        head_dim: D, even.
        num_experts: heads that are live at the start.
        max_num_experts: E, the number of allocated heads; None for num_experts.
        mode: "per_head" or "composite".
        bias: whether the heads have biases.
        rope_theta: base of the rotary embedding's wavelengths.
        dropout: dropout rate of the output, in training.
        checkpoint: whether to recompute the heads in backward.
        surprise_kind: "o_proj": norm of the gradient that a pair of a token and a head causes in W_o[e]; "head": in all weights and biases
            of the head, by its own projections.
        target_k, routing, surprise_budget, gating_loss, thresholds, form, scale, min_experts, max_experts, combine, level, demand: as in
            `DynMoE`, for heads.

    Raises:
        TypeError, ValueError: an option has the wrong type, is out of range, or conflicts with another.
    """

    surprise_kind: HeadSurprise

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_experts: int,
        *,
        max_num_experts: int | None = None,
        mode: Mode = "per_head",
        bias: bool = False,
        rope_theta: float = 10000.0,
        dropout: float = 0.0,
        checkpoint: bool = False,
        target_k: float | None = None,
        routing: RoutingKind = "threshold",
        surprise_budget: float | None = None,
        gating_loss: GatingLoss | None = None,
        surprise_kind: HeadSurprise = "o_proj",
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
        check_choice("mode", mode, get_args(Mode))
        check_choice("surprise_kind", surprise_kind, get_args(HeadSurprise))
        for name, flag in (("bias", bias), ("checkpoint", checkpoint)):
            check_flag(name, flag)
        check_number("rope_theta", rope_theta, above=0)
        check_number("dropout", dropout, at_least=0, below=1)
        check_size("head_dim", head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}.")
        self.head_dim, self.mode, self.rope_theta, self.checkpoint = head_dim, mode, rope_theta, checkpoint

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(len(self.expert_counts), *shape, device=device, dtype=dtype))

        self.qkv_proj, self.o_proj = parameter(3 * head_dim, hidden_size), parameter(hidden_size, head_dim)
        self.qkv_bias = parameter(3 * head_dim) if bias else None
        self.o_bias = parameter(hidden_size) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises heads like `nn.Linear`, and the router by its own `reset_parameters`."""
        self.router.reset_parameters()
        self.reset_experts()
        self.reset_statistics()

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters(recurse=False))

    @torch.no_grad()
    def reset_experts(self, experts: Tensor | None = None) -> None:
        for weight, bias in ((self.qkv_proj, self.qkv_bias), (self.o_proj, self.o_bias)):
            reset_rows(weight, weight.shape[-1], experts)
            if bias is not None:
                reset_rows(bias, weight.shape[-1], experts)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: DynSMHACache | None = None,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
        surprise_budget: Budget | None = None,
    ) -> Tensor:
        """Attends to these tokens and to those in the cache.

        Args:
            hidden_states: (B, T, F).
            position_ids: (B, T) or (1, T); None to count from the start of each row or packed sequence.
            cache: earlier keys and values, without gradients; the new ones are appended. It contains key_start.
            key_start, key_end: (B,) int32 or int64, first position of each row that is not padding, and first position of padding after it.
            cu_seqlens: (sequences + 1,) int32 or int64, boundaries of sequences packed in one row.
            token_mask, surprise_budget: see `DynMoE.forward`.

        Returns:
            (B, T, F), in the dtype of the heads or of autocast; 0 for padded tokens, NaN for a token that contains NaN or infinity.

        Raises:
            TypeError, ValueError: hidden_states or a bound has the wrong type or shape; bounds are given together with a cache; the cache
                has other rows, heads or dtype.
        """
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states must be a tensor, got {type(hidden_states).__name__}.")
        features = self.o_proj.shape[1]
        if hidden_states.dim() != 3 or hidden_states.shape[2] != features:
            raise ValueError(f"hidden_states must have shape (B, T, {features}), got {tuple(hidden_states.shape)}.")
        if hidden_states.dtype != self.o_proj.dtype and autocast_dtype(hidden_states) is None:
            raise TypeError(f"hidden_states must be {self.o_proj.dtype} like the heads, or come under autocast, got {hidden_states.dtype}.")
        if cache is not None:
            if any(bound is not None for bound in (key_start, key_end, cu_seqlens)):
                raise ValueError("key_start, key_end and cu_seqlens must be None beside a cache, which carries key_start.")
            if not isinstance(cache, DynSMHACache):
                raise TypeError(f"cache must be a DynSMHACache, got {type(cache).__name__}.")
            cache.check_rows(len(hidden_states))
            key_start = cache.key_start
        before = 0 if cache is None else cache.length
        tokens_after = before + hidden_states.shape[1]
        bounds = checked_bounds(hidden_states, hidden_states, tokens_after, cu_seqlens, key_start, key_end)
        if not torch.compiler.is_compiling():
            check_bound_values(tokens_after, bounds)
        cu_seqlens, key_start, key_end = bounds
        routed = self._routed(hidden_states, surprise_budget, token_mask, _not_padding(hidden_states, before, key_start, key_end))
        if position_ids is None:
            position_ids = positions(hidden_states, before, key_start, cu_seqlens)
        position_ids = _position_rows(position_ids, hidden_states.shape[:2])
        turn = rotation(position_ids, self.head_dim, self.rope_theta, autocast_dtype(hidden_states) or hidden_states.dtype)
        batch = hidden_states.shape[0]
        arguments = (routed.tokens, routed.routing, turn, (hidden_states.shape[:2], cu_seqlens, key_start, key_end), routed.probe)
        if before:
            assert cache is not None
            out = self._decode(routed.tokens, routed.routing, turn, batch, cache)
        elif cache is not None:
            out, key, value, order = self._run(*arguments)
            pairs = self._pairs(key.detach(), value.detach(), routed.routing, batch, cache, order)[0]
            cache.append(batch, self._heads, hidden_states.shape[1], pairs)
        elif self.checkpoint and torch.is_grad_enabled() and not self._transformed():
            out = checkpoint(self.execute, *arguments, use_reentrant=False)
        else:
            out = self.execute(*arguments)
        assert isinstance(out, Tensor)
        return self.dropout(out).view(hidden_states.shape)

    def execute(self, tokens: Tensor, routing: Routing, turn: Turn, bounds: tuple[Any, ...], surprise: Tensor | None = None) -> Tensor:
        """Runs the chosen heads over whole sequences: (N, F) -> (N, F).

        Args:
            tokens: (N, F), N = B * T.
            routing: heads of each token.
            turn: cosines and sines of each token's position, each (N, D / 2).
            bounds: (B, T), cu_seqlens, key_start, key_end.
            surprise: (N, K) zeros whose gradient becomes the surprise; None for no surprise.
        """
        return self._run(tokens, routing, turn, bounds, surprise)[0]

    def _run(
        self, tokens: Tensor, routing: Routing, turn: Turn, bounds: tuple[Any, ...], surprise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, SlotOrder]:
        """As `execute`; also the keys and values of pairs, as `_project` gives them, and the order of the slots, which serves all."""
        of_qkv, of_o = (None, surprise) if surprise is None or self.surprise_kind == "o_proj" else _JoinedProbe.apply(surprise)
        shape, cu_seqlens, key_start, key_end = bounds
        window = max(1, shape[1])
        order = sort_slots(routing.top_k_index, len(self.o_proj), _dtype(tokens, self.o_proj))
        query, key, value = self._project(tokens, routing, turn, of_qkv, order)
        if self.mode == "composite":
            rows = [x.view(*shape, 1, self.head_dim) for x in (query, key, value)]
            attended = sliding_window_attention(
                rows[0], rows[1], rows[2], window, cu_seqlens=cu_seqlens, key_start=key_start, key_end=key_end
            )  # fmt: skip
            attended = attended.view(len(tokens), self.head_dim)
        else:
            starts = self._starts(routing.top_k_index, shape, cu_seqlens)
            rows = [x[None, :, None] for x in (query, key, value)]
            found = sliding_window_attention(rows[0], rows[1], rows[2], window, cu_seqlens=starts)[0, :, 0]
            attended = _InSlots.apply(found, order.slots[: len(found)], len(order.slots))
            attended = attended.view(*routing.top_k_index.shape, self.head_dim)
        return self._output(attended, routing, of_o, order), key, value, order

    @property
    def _heads(self) -> int:
        """Heads of a cache."""
        return 1 if self.mode == "composite" else len(self.o_proj)

    def _project(self, tokens: Tensor, routing: Routing, turn: Turn, surprise: Tensor | None, order: SlotOrder) -> list[Tensor]:
        """Queries, keys and values, rotated: of pairs in sorted order, (R, D), or of tokens in mode "composite", (N, D).

        R is the number of used pairs, or on devices and in compiled code, where the host does not know it, that of all slots.
        """
        dtype = _dtype(tokens, self.o_proj)
        bias = None if self.qkv_bias is None else self.qkv_bias.to(dtype)
        merged = self.mode == "composite"
        weights = routing.top_k_weights if merged else None
        qkv = expert_linear(
            tokens.to(dtype), self.qkv_proj.to(dtype), routing.top_k_index, weights, bias=bias, surprise=surprise, order=order
        )
        if merged:
            query, key, value = qkv.split(self.head_dim, -1)
            return [rotate(query, turn), rotate(key, turn), value]
        known = order.slots.device.type == "cpu" and not torch.compiler.is_compiling()
        slots = order.slots[: int(order.offsets[-1])] if known else order.slots
        return list(_Arranged.apply(qkv.flatten(0, 1), slots, *turn))

    def _output(self, attended: Tensor, routing: Routing, surprise: Tensor | None, order: SlotOrder | None) -> Tensor:
        dtype = attended.dtype
        bias = None if self.o_bias is None else self.o_bias.to(dtype)
        return expert_linear(
            attended, self.o_proj.to(dtype), routing.top_k_index, routing.top_k_weights, bias=bias, surprise=surprise, order=order
        )

    def _starts(self, top_k_index: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
        """Bounds of each head's pairs in each sequence, (E * sequences + 1,) int32, in sorted order."""
        heads, device = len(self.o_proj), top_k_index.device
        place = torch.arange(len(top_k_index), device=device)
        sequences = shape[0] if cu_seqlens is None else max(1, len(cu_seqlens) - 1)
        sequence = place // max(1, shape[1]) if cu_seqlens is None else sequence_numbers(cu_seqlens, place)
        group = torch.where(top_k_index < heads, top_k_index * sequences + sequence.unsqueeze(-1), heads * sequences).flatten()
        counts = torch.zeros(heads * sequences + 1, dtype=torch.int64, device=device).scatter_add_(0, group, torch.ones_like(group))
        return torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)]).int()

    def _decode(self, tokens: Tensor, routing: Routing, turn: Turn, batch: int, cache: DynSMHACache) -> Tensor:
        """Attends to the tokens of the cache and to new ones, which are appended."""
        order = sort_slots(routing.top_k_index, len(self.o_proj), _dtype(tokens, self.o_proj))
        query, key, value = self._project(tokens, routing, turn, None, order)
        pairs, chosen, used = self._pairs(key, value, routing, batch, cache, order)
        query = query[chosen]
        seen = cache.append(batch, self._heads, len(tokens) // batch if batch else 0, pairs)
        found = cache.attend(query, pairs.row, pairs.head, seen, self.head_dim**-0.5)
        places = len(tokens) if self.mode == "composite" else len(order.slots)
        attended = query.new_zeros(places, self.head_dim).index_copy(0, used, found)
        if self.mode == "per_head":
            attended = attended.view(*routing.top_k_index.shape, -1)
        return self._output(attended, routing, None, order)

    def _pairs(
        self, key: Tensor, value: Tensor, routing: Routing, batch: int, cache: DynSMHACache, order: SlotOrder
    ) -> tuple[Pairs, Tensor, Tensor]:
        """The used pairs of rows of keys and values; which rows they are; and their slots, or tokens in mode "composite"."""
        index = routing.top_k_index
        of_row = max(1, len(index) // max(1, batch))
        if self.mode == "composite":
            place = torch.arange(len(index), device=index.device)
            start = 0 if cache.key_start is None else cache.key_start[place // of_row]
            used = torch.nonzero(cache.length + place % of_row >= start).squeeze(-1)
            token, head, chosen = used, torch.zeros_like(used), used
        else:
            number = int(order.offsets[-1])
            used = order.slots[:number]
            token, head, chosen = used // index.shape[1], index.flatten()[used].long(), torch.arange(number, device=used.device)
        return Pairs(token // of_row, head, cache.length + token % of_row, key[chosen], value[chosen]), chosen, used

    def extra_repr(self) -> str:
        heads, features, dim = self.o_proj.shape
        return f"hidden_size={features}, head_dim={dim}, num_experts={heads}, mode={self.mode}, {self._routing_repr()}"


class _Arranged(torch.autograd.Function):
    """Queries, keys and values, (R, D) each, of slots in a given order, rotated: one copy, of which backward keeps nothing.

    Arguments: qkv (N * K, 3 D); slots (R,); cosines and sines of tokens, (N, D / 2).
    """

    @staticmethod
    def forward(qkv: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = _of_slots(len(qkv), slots, cos, sin)
        query, key, value = (part[slots] for part in qkv.chunk(3, -1))
        return rotate(query, turn), rotate(key, turn), value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.number = len(qkv)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, None, None, None]:
        slots, cos, sin = ctx.saved_tensors
        cos, sin = _of_slots(ctx.number, slots, cos, sin)
        dim = grad_value.shape[-1]
        grad = grad_value.new_zeros(ctx.number, 3 * dim)
        for place, part in enumerate((rotate(grad_query, (cos, -sin)), rotate(grad_key, (cos, -sin)), grad_value)):
            grad[:, place * dim : (place + 1) * dim].index_copy_(0, slots, part)
        return grad, None, None, None


def _of_slots(number: int, slots: Tensor, cos: Tensor, sin: Tensor) -> Turn:
    token = slots // max(1, number // max(1, len(cos)))
    return cos[token], sin[token]


class _InSlots(torch.autograd.Function):
    """(R, D) rows put into their slots, (number, D); 0 in the others. Slots are distinct, which index_copy of autograd does not know."""

    @staticmethod
    def forward(rows: Tensor, slots: Tensor, number: int) -> Tensor:
        return rows.new_zeros(number, rows.shape[-1]).index_copy_(0, slots, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad[slots], None, None


class _JoinedProbe(torch.autograd.Function):
    """Two probes whose gradients, norms of two parts of a gradient, become the norm of both."""

    @staticmethod
    def forward(probe: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(probe), torch.zeros_like(probe)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return torch.hypot(first, second)


def _dtype(tokens: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of a call: that of autocast, or of the weights."""
    return autocast_dtype(tokens) or weight.dtype


def _position_rows(position_ids: Tensor, shape: torch.Size) -> Tensor:
    """(N,) positions, of (B, T) or (1, T)."""
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
        kind = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids must be a tensor of integers, got {kind}.")
    if tuple(position_ids.shape) not in ((1, shape[1]), tuple(shape)):
        raise ValueError(f"position_ids must have shape {tuple(shape)} or (1, {shape[1]}), got {tuple(position_ids.shape)}.")
    return position_ids.expand(shape).reshape(-1)


def _not_padding(hidden_states: Tensor, before: int, key_start: Tensor | None, key_end: Tensor | None) -> Tensor | None:
    """(N,) bool, tokens that are not padding; None if all are real."""
    if key_start is None and key_end is None:
        return None
    place = torch.arange(before, before + hidden_states.shape[1], device=hidden_states.device)
    real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    if key_start is not None:
        real &= place >= key_start[:, None]
    if key_end is not None:
        real &= place < key_end[:, None]
    return real.flatten()
