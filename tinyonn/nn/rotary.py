"""Rotary position embedding of queries and keys.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]  # cosines and sines


def rotation(position_ids: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Turn:
    """Cosines and sines of positions (...), each (..., D / 2)."""
    # Not a buffer: half precision would be too coarse for the angles of distant positions.
    wide = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, dim, 2, device=position_ids.device, dtype=wide)
    angle = position_ids.unsqueeze(-1) * theta ** (-pair / dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotates features i and i + D / 2 of (..., D) as a pair."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def positions(x: Tensor, before: int, key_start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token of (B, T, ...) in its sequence, (1 or B, T), where `before` tokens came earlier."""
    place = torch.arange(before, before + x.shape[1], device=x.device)[None]
    if cu_seqlens is not None:
        return place - cu_seqlens[sequence_numbers(cu_seqlens, place[0])]
    return place if key_start is None else (place - key_start[:, None]).clamp(min=0)


def sequence_numbers(cu_seqlens: Tensor, place: Tensor) -> Tensor:
    """Which packed sequence each row (T,) belongs to."""
    return torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
