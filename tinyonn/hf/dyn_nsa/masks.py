"""Where each row of keys begins and ends: the masks of DynNSA, and the use of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...errors import InputError


def dyn_nsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers' AttentionMaskInterface: where each row begins and ends, instead of a T × Tk mask.

    Args:
        q_offset: position of the first query; a 0-d tensor where the cache is a buffer.

    Returns:
        None for rows without padding whose last key is the last query's. (B, 1, 1, 2) int32, first key and one past the last; with a
        third number, one past the last query's position, where the keys are a buffer that is longer. A bool mask, as for SDPA, for
        layers with a sliding window, and for what cannot be said with such bounds.

    Raises:
        InputError: padding between tokens.
    """
    compiling = torch.compiler.is_compiling()
    plain = mask_function is causal_mask_function
    if not plain and local_size is None and not use_vmap and kv_offset == 0 and compiling:
        # While compiling, transformers never says whether sequences are packed, but masks as if they were; checked when it runs.
        row, place = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
        seen = mask_function(row, torch.zeros_like(row), place, place - 1)
        torch._assert_async(torch.as_tensor(seen).all(), "sequences must not be packed under torch.compile with dyn_nsa")
        plain = True
    if not plain or local_size is not None or kv_offset != 0:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, use_vmap=use_vmap,
            device=device, **kwargs,
        )  # fmt: skip
    is_buffer = isinstance(q_offset, Tensor) or kv_length != q_offset + q_length
    query_end = q_offset + q_length
    if attention_mask is None:
        if not is_buffer:
            return None
        start = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = start + query_end
    else:
        padding = attention_mask[:, :kv_length].bool()
        if not is_buffer and not compiling and padding.shape[1] == kv_length and bool(padding.all()):
            return None
        place = torch.arange(1, padding.shape[1] + 1, device=device)
        end = (padding * place).amax(-1)
        start = torch.where(end > 0, padding.int().argmax(-1), 0)
        whole = (padding.sum(-1) == end - start).all()
        message = "attention_mask must hold padding only before or after a row's tokens, got padding between them."
        if compiling:
            torch._assert_async(whole, message)
        elif not whole:
            raise InputError(message)
    bounds = [start, end]
    if is_buffer:
        bounds.append(torch.zeros_like(start) + query_end)
    return torch.stack([bound.int() for bound in bounds], -1)[:, None, None]


def within_bounds(key: Tensor, value: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values whose last one is the last query's, and where rows begin and end among them."""
    start, end, *query_end = bounds.unbind(-1)
    if query_end:
        # A buffer holds room behind the last token: turned round, so that it lies in front of the first.
        size, last = key.shape[2], query_end[0][0]
        place = (torch.arange(size, device=key.device) + last) % size
        key, value = key.index_select(2, place), value.index_select(2, place)
        start, end = start + (size - last), end + (size - last)
    return key, value, start, end


def row_starts(mask: Any) -> Tensor | None:
    """(B,) first token of each row, of a mask that a model is given: of padding, of `dyn_nsa_mask`, or several of those by kind."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    return mask.int().argmax(-1) if mask.dim() == 2 else mask[:, 0, 0, 0].long()
