"""What a mask of padding means for the sparse kinds of attention.

B batch, T new tokens of Tk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError


class Bounds(NamedTuple):
    """Attributes: key_start, key_end: (B,), first token of each row and first position of padding after it; None without padding."""

    key_start: Tensor | None = None
    key_end: Tensor | None = None


def bounds_of(attention_mask: Tensor | None, length: int, attention: str) -> Bounds:
    """Bounds of the rows of a mask (B, Tk).

    Args:
        length: Tk, tokens in the cache and new ones.
        attention: kind, for messages.

    Raises:
        InputError: the mask has another shape, or padding between tokens.
    """
    if attention_mask is None:
        return Bounds()
    if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        raise InputError(
            f"attention_mask must be None or (batch, {length}) with attention={attention!r}, one place for each token and each in the "
            f"cache, got {tuple(attention_mask.shape)}."
        )
    real = attention_mask != 0
    compiling = torch.compiler.is_compiling()
    if not compiling and bool(real.all()):
        return Bounds()
    end = (real * torch.arange(1, length + 1, device=real.device)).amax(-1)
    start = torch.where(end > 0, real.int().argmax(-1), 0)
    whole = (real.sum(-1) == end - start).all()
    message = f"attention_mask must have no padding between tokens with attention={attention!r}; pad the left of rows that continue."
    if compiling:
        torch._assert_async(whole, message)
    elif not bool(whole):
        raise InputError(message)
    return Bounds(start, end)


def restarts(position_ids: Tensor | None) -> bool:
    """Whether positions (B, T) restart within a row, as those of packed sequences do. False while compiling, which cannot read values."""
    if position_ids is None or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def sequences_of(position_ids: Tensor | None, attention: str) -> Tensor | None:
    """Bounds (sequences + 1,) int32 of sequences packed in one row, which positions (1, T) that restart mark; None for one sequence.

    Raises:
        InputError: positions restart in one of several rows.
    """
    if position_ids is not None and torch.compiler.is_compiling():
        message = f"under torch.compile, attention={attention!r} takes packed sequences by cu_seq_lens_q only."
        torch._assert_async((position_ids.diff(dim=-1) == 1).all(), message)
    if position_ids is None or not restarts(position_ids):
        return None
    if len(position_ids) > 1:
        raise InputError(f"position_ids must count on in each of several rows with attention={attention!r}; pack sequences in one row.")
    inner = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), position_ids.shape[-1])]).int()
