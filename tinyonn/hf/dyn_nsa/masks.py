"""Masks of DynNSA: bounds of each row of keys and of the sequences packed in it, and keys to ignore between them.

A mask can have holes, for example in a batch of conversations whose turns were padded one by one. The remaining keys are then moved
together before attention: keys of earlier forwards end where the new ones begin, and new ones that are padding go last. Blocks are counted
over the remaining keys, so padding enters no block, compressed key, entropy or selection.

B batch, T queries of Tk keys
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """A mask function for transformers' AttentionMaskInterface; it returns bounds of each row instead of a T × Tk mask.

    Args:
        q_offset: position of the first query; a 0-d tensor if the cache is a buffer.

    Returns:
        One of these:

        - None: no padding, and the last key belongs to the last query.
        - (B, 1, 1, 2) int32: first key of each row, and one past its last. A third number is one past the last query's position, if the
          keys are a longer buffer.
        - (B, 1, 2, Tk) int32, for padding between tokens, and while compiling for any padding: the order of `Compaction`, then its start
          and end.
        - (1, 1, sequences + 1, 1) int32, at least 3 bounds of the packed sequences, in the rows concatenated.
        - (B, 1, 1, 1) int32, while compiling without a mask: 0 if no row is packed.
        - a bool mask, as for SDPA, for layers with a sliding window, and for masks that such bounds cannot express.
    """
    compiling = torch.compiler.is_compiling()
    plain = mask_function is causal_mask_function
    if not plain and local_size is None and not use_vmap and attention_mask is None and q_length == kv_length:
        # Without a cache: transformers' mask function for position_ids that restart, and while compiling, for any position_ids.
        begins, whole = _beginnings(mask_function, batch_size, q_length, device)
        several = begins[:, 1:].any()
        if compiling:
            return (several | ~whole).int().expand(batch_size, 1, 1, 1)
        if whole:
            return torch.nn.functional.pad(begins.flatten(), (0, 1), value=True).nonzero().int()[None, None] if several else None
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
        # Two keys cannot have a hole. While compiling, the branch cannot depend on values.
        if kv_length > 2 and (compiling or bool((padding.sum(-1) != end - start).any())):
            return _order(padding, q_length, kv_length, query_end)
    bounds = [start, end]
    if is_buffer:
        bounds.append(torch.zeros_like(start) + query_end)
    return torch.stack([bound.int() for bound in bounds], -1)[:, None, None]


def _order(padding: Tensor, q_length: int, kv_length: int, query_end: Any) -> Tensor:
    """(B, 1, 2, Tk) int32 for a mask (B, up to Tk) bool; see `Compaction`."""
    present = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    place = torch.arange(kv_length, device=padding.device)
    new = (place >= query_end - q_length) & (place < query_end)
    kind = torch.where(new, 3 - present.int(), (present & (place < query_end)).int())
    order = kind.argsort(dim=-1, stable=True)
    bounds = torch.zeros_like(order)
    bounds[:, 0], bounds[:, 1] = (kind == 0).sum(-1), (kind < 3).sum(-1)
    return torch.stack([order, bounds], 1)[:, None].int()


def _beginnings(mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens that begin a sequence, (B, T) bool, and whether the mask is that of consecutive causal sequences, 0-d bool.

    A token that may not attend to the one before it begins a sequence. Both ends of the keys of each query are checked; masks of
    transformers are assumed to have no holes between them.
    """
    row, place = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]

    def seen(query: Tensor, key: Tensor) -> Tensor:
        """(B, T) bool, whether queries may attend to keys; key positions are clamped to the row."""
        found = mask_function(row, torch.zeros_like(row), query, key.clamp(0, length - 1))
        return torch.as_tensor(found, device=device).expand(batch, length)

    begins = ~seen(place, place - 1) | (place == 0)
    first = torch.where(begins, place, 0).cummax(-1).values
    inside = seen(place, place) & seen(place, first)
    outside = (seen(place, first - 1) & (first > 0)) | (seen(place, place + 1) & (place < length - 1))
    return begins, (inside & ~outside).all()


class Compaction(NamedTuple):
    """Order of keys for rows with holes, in which the remaining keys are contiguous.

    Attributes:
        order: (B, Tk) int64, index of the key at each place: ignored earlier keys, other earlier keys, other new keys, ignored new keys,
            each group in its original order. The T new keys stay the last T.
        rows: (B, 2) int32, first place of a remaining key, and one past the last.
    """

    order: Tensor
    rows: Tensor

    def queries(self, tokens: int) -> Tensor:
        """(B, T), index of the query at each of the last `tokens` places."""
        order = self.order[:, self.order.shape[1] - tokens :]
        return order - order.amin(-1, keepdim=True)


class Layout(NamedTuple):
    """Content of a mask; at most one field is set."""

    rows: Tensor | None = None  # (B, 2 or 3) int32, bounds of padded rows
    sequences: Tensor | None = None  # (sequences + 1,) int32, bounds of packed sequences
    compaction: Compaction | None = None  # of rows with holes


def layout_of(mask: Tensor | None, batch: int, cu_seq_lens_q: Tensor | None) -> Layout:
    """Content of a mask from `dyn_nsa_mask`.

    Args:
        cu_seq_lens_q: the caller's bounds of packed sequences, used instead of those of the mask.

    Raises:
        InputError: another mask, or padding together with cu_seq_lens_q.
    """
    if cu_seq_lens_q is not None:
        if mask is not None and mask.dtype == torch.int32 and mask.shape[-1] > 1:
            raise InputError("attention_mask must be None with cu_seq_lens_q for attn_implementation='dyn_nsa', got a mask of padding.")
        if not isinstance(cu_seq_lens_q, Tensor) or cu_seq_lens_q.dim() != 1 or not len(cu_seq_lens_q):
            found = tuple(cu_seq_lens_q.shape) if isinstance(cu_seq_lens_q, Tensor) else type(cu_seq_lens_q).__name__
            raise InputError(f"cu_seq_lens_q must be a tensor (sequences + 1,), got {found}.")
        return Layout(sequences=cu_seq_lens_q.int())
    if mask is None:
        return Layout()
    if mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == 1:
        kind = (mask.shape[0], mask.shape[2], mask.shape[3])
        if kind in ((batch, 1, 2), (batch, 1, 3)):
            return Layout(rows=mask[:, 0, 0])
        if kind[:2] == (batch, 2) and kind[2] > 2:
            return Layout(compaction=Compaction(mask[:, 0, 0].long(), mask[:, 0, 1, :2]))
        if kind == (1, mask.shape[2], 1) and mask.shape[2] > 2:
            return Layout(sequences=mask.flatten())
        if kind == (batch, 1, 1):
            torch._assert_async(
                (mask == 0).all(),
                "under torch.compile, dyn_nsa supports neither packed sequences without cu_seq_lens_q nor masks other than padding; "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True) adds cu_seq_lens_q.",
            )
            return Layout()
    raise InputError(
        "attention_mask must be None or (batch, tokens) of padding for attn_implementation='dyn_nsa', got a mask of shape "
        f"{tuple(mask.shape)}. Mark sequences packed in a row by position_ids that restart, or pass cu_seq_lens_q."
    )


def gathered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """`x` with each row of the batch reordered along `dim` by its row of `order`, (B, n)."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand(*(size if axis != dim else -1 for axis, size in enumerate(x.shape))))


def within_bounds(key: Tensor, value: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values that end with those of the last query, and first and last bound of each row in them."""
    start, end, *query_end = bounds.unbind(-1)
    if query_end:
        # A buffer has free places after the last token. Rolling it moves them in front of the first.
        size, last = key.shape[2], query_end[0][0]
        place = (torch.arange(size, device=key.device) + last) % size
        key, value = key.index_select(2, place), value.index_select(2, place)
        start, end = start + (size - last), end + (size - last)
    return key, value, start, end


def row_marks(mask: Any) -> Tensor | None:
    """A tensor to compare between forwards, which changes if the rows of a cache are laid out differently.

    Args:
        mask: mask that the caller gave to the model: of padding, from `dyn_nsa_mask`, or a dict of masks by kind of layer.

    Returns:
        (B, T), a mask of padding itself; (B,), first token of each row, for a mask from `dyn_nsa_mask`; NaN, which equals nothing, for one
        with holes from there; None without a mask.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() != 4:
        raise InputError(f"attention_mask must be None or (batch, tokens), got shape {tuple(mask.shape)}.")
    return mask[:, 0, 0, 0].long() if mask.shape[2] == 1 else torch.full((len(mask),), torch.nan, device=mask.device)
