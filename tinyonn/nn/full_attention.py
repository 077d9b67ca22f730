"""Plain causal attention with rotary embedding, to compare the sparse kinds with.

B batch, T tokens, H heads, D head dim
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .rotary import positions, rotate, rotation

# Appends keys and values, each (B, H, T, D), to those of earlier calls, and returns all of them.
Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class FullAttention(nn.Module):
    """Causal self-attention of H heads over all earlier tokens, by `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        hidden_size: features in and out.
        head_dim: D, even, dividing hidden_size.
        rope_theta: base of the rotary embedding's wavelengths.
        device, dtype: device and dtype of all parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        *,
        rope_theta: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta

        def projection() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projection(), projection(), projection(), projection()

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        append: Append | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends to these tokens and to those that `append` has.

        Args:
            hidden_states: (B, T, hidden_size).
            position_ids: (B, T) or (1, T); None to count from 0.
            append: appends keys and values to those of earlier calls and returns all of them; None for no earlier ones.
            attention_mask: (B, 1, T, Tk), a mask of `scaled_dot_product_attention`; None for causal attention, in which a token's position
                is the place of its key.

        Returns:
            (B, T, hidden_size).
        """
        query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if position_ids is None:
            position_ids = positions(hidden_states, 0, None, None)
        turn = rotation(position_ids.unsqueeze(-1), self.head_dim, self.rope_theta, query.dtype)
        query, key, value = (x.transpose(1, 2) for x in (rotate(query, turn), rotate(key, turn), value))
        if append is not None:
            key, value = append(key, value)
        queries, keys = query.shape[2], key.shape[2]
        causal = attention_mask is None and queries > 1
        if causal and keys != queries:  # is_causal counts queries from the first key; a cache may also hold places that are still empty
            attention_mask = (torch.arange(keys, device=key.device) <= position_ids.unsqueeze(-1)).unsqueeze(1)
        causal = causal and keys == queries
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))
