"""DynNSA as an attention layer: projections, rotary embedding, `DynNSACore`, cache.

B batch, T queries, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import check_flag, check_number, check_size
from ..ops.nsa._checks import checked_bounds
from .dyn_nsa import DynNSACore, DynNSAOptions, check_tau, checked_price
from .dyn_nsa_cache import DynNSACache
from .rotary import positions, rotate, rotation


class DynNSAAttentionOutput(NamedTuple):
    """Output of `DynNSAAttention`.

    Attributes:
        out: (B, T, hidden_size).
        budget_loss: 0-d; 0 if budget_weight is 0.
        counts: (B, T, K) int32, key blocks that the selected branch read.
        tau: (B, T, K), the uncertainty that set the thresholds.
        overflow: 0-d, share of rows for which more than max_blocks passed.
        soft_counts: (B, T, K), differentiable counts for `budget_loss`.
        distillation_loss: 0-d; 0 if distil_weight is 0, and in evaluation.
    """

    out: Tensor
    budget_loss: Tensor
    counts: Tensor
    tau: Tensor
    overflow: Tensor
    soft_counts: Tensor
    distillation_loss: Tensor


class DynNSAAttention(nn.Module):
    """Causal self-attention with a learned number of key blocks per query, which depends on uncertainty.

    It consists of projections, rotary embedding, compression, branch gates (from the query before rotation) and thresholds per key/value
    head.

    Args:
        hidden_size: features in and out.
        num_heads: H.
        num_kv_heads: K, dividing H; None for H.
        head_dim: D, even; None for hidden_size / H.
        bias: whether the projections have biases.
        rope_theta: base of the rotary embedding's wavelengths.
        options: options of the attention; None for the defaults of `DynNSAOptions`.
        device, dtype: device and dtype of all parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        rope_theta: float = 10000.0,
        options: DynNSAOptions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_size(name, size)
        check_flag("bias", bias)
        check_number("rope_theta", rope_theta, above=0)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads}.")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"hidden_size must be a multiple of num_heads {num_heads}, got {hidden_size}.")
            head_dim = hidden_size // num_heads
        check_size("head_dim", head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}.")
        self.hidden_size, self.head_dim, self.rope_theta = hidden_size, head_dim, rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias, device=device, dtype=dtype)
        self.core = DynNSACore(num_heads, num_kv_heads, head_dim, options, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: DynNSACache | None = None,
        tau: Tensor | float | None = None,
        price: Tensor | float | None = None,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> DynNSAAttentionOutput:
        """Attends to these tokens and to those in the cache.

        Args:
            hidden_states: (B, T, hidden_size).
            position_ids: (B, T) or (1, T); None to count from the start of each row or packed sequence.
            cache: earlier keys and values, without gradients; the new ones are appended. It contains key_start.
            tau: (), (B,), (B, T) or (B, T, K) in [0, 1]; None for the tau of `tau_source`.
            price: price of this call, a number or 0-d, in nats; None for the layer's. A lower one reads more blocks.
            key_start, key_end: (B,) int32 or int64, first position of each row that is not padding, and first position of padding after it.
            cu_seqlens: (sequences + 1,) int32 or int64, boundaries of sequences packed in one row.

        Returns:
            out (B, T, hidden_size) and what the call read.

        Raises:
            TypeError, ValueError: see `ops.dyn_nsa`; hidden_states or tau has the wrong shape; key_start, key_end or cu_seqlens is given
                together with a cache; the cache belongs to another layer or has other rows.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states must have shape (B, T, {self.hidden_size}), got {tuple(hidden_states.shape)}.")
        if cache is not None:
            if any(bound is not None for bound in (key_start, key_end, cu_seqlens)):
                raise ValueError("key_start, key_end and cu_seqlens must be None beside a cache, which carries key_start.")
            cache.check_rows(len(hidden_states))
            key_start = cache.key_start
        before = 0 if cache is None else cache.length
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # fmt: skip
        cu_seqlens, key_start, key_end = checked_bounds(query, key, before + key.shape[1], cu_seqlens, key_start, key_end)
        if isinstance(tau, Tensor):
            check_tau(tau)
        tau = self.core.tau_of(tau, query, decoding=before > 0)
        gates = self.core.gates(query)
        if position_ids is None:
            position_ids = positions(hidden_states, before, key_start, cu_seqlens)
        turn = rotation(position_ids, self.head_dim, self.rope_theta, query.dtype)
        query, key = rotate(query, turn), rotate(key, turn)
        key_compressed = value_compressed = None
        if cache is not None:
            key, value, key_compressed, value_compressed = cache.append(self.core, key, value)
        result = self.core(
            query, key, value, gates, key_compressed=key_compressed, value_compressed=value_compressed, tau=tau,
            price=None if price is None else checked_price("price", price), key_start=key_start, key_end=key_end, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        self.core.record(result, gates, key.shape[1], key_start=key_start, cu_seqlens=cu_seqlens)
        loss = self.core.budget_loss(result)
        distillation = self.core.distillation_loss(query, key, key_start=key_start, key_end=key_end, cu_seqlens=cu_seqlens)
        out = self.o_proj(result.out.flatten(2))
        return DynNSAAttentionOutput(out, loss, result.counts, result.tau, result.overflow, result.soft_counts, distillation)
