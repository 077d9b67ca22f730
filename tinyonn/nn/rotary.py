"""Rotary position embedding of queries and keys.

B batch, T tokens, D head dim
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of (B, T) positions, each (B, T, 1, D / 2). `theta` is the base of the wavelengths."""
    # Not a buffer: half precision would be too coarse for the angles of distant positions.
    wide = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=wide)
    angle = position_ids[..., None, None] * theta ** (-pair / head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates features i and i + D/2 of (B, T, heads, D) as a pair."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def positions(x: Tensor, before: int, key_start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token of (B, T, ...) in its sequence, (1 or B, T), after `before` tokens."""
    place = torch.arange(before, before + x.shape[1], device=x.device)[None]
    if cu_seqlens is not None:
        return place - cu_seqlens[torch.searchsorted(cu_seqlens, place.int(), right=True) - 1]
    return place if key_start is None else (place - key_start[:, None]).clamp(min=0)
