"""Checks and shapes that the ops of DynNSA share.

B batch, T queries of Tk positions (the last ones), H query heads, K key/value heads, D head dim, M compressed keys
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._debug import debug_enabled
from .._attention import order_hint
from .._checks import check_int, check_number, check_same_device, check_size
from .._dispatch import statistics_dtype

COMPRESS_SIZES = (16, 32, 64)
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny  # smaller values lose digits in float32, or become 0


class Bounds(NamedTuple):
    """First and last positions of the sequences: of those packed in one row, or of each row without its padding."""

    cu_seqlens: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None


def checked_bounds(
    query: Tensor, key: Tensor, num_keys: int, cu_seqlens: Tensor | None, key_start: Tensor | None, key_end: Tensor | None
) -> Bounds:
    """Checks types and shapes of the bounds and converts them to int32. `check_bound_values` checks their values."""
    batch, num_queries = query.shape[:2]
    check_int("num_keys", num_keys)
    if num_queries > num_keys:
        hint = order_hint(query, key)
        raise ValueError(f"query must have at most {num_keys} tokens, the number of keys, got {num_queries}{hint}.")
    if cu_seqlens is not None:
        if key_start is not None or key_end is not None:
            raise ValueError("key_start and key_end must be None if cu_seqlens is given.")
        if batch != 1 or num_queries != num_keys:
            raise ValueError(
                f"cu_seqlens needs one row and as many queries as keys, got {batch} rows, {num_queries} queries, {num_keys} keys."
            )
        cu_seqlens = _as_int32("cu_seqlens", cu_seqlens, query, num_keys)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}.")
    rows = []
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound is not None:
            bound = _as_int32(name, bound, query, num_keys)
            if tuple(bound.shape) != (batch,):
                raise ValueError(f"{name} must have shape ({batch},), got {tuple(bound.shape)}.")
        rows.append(bound)
    return Bounds(cu_seqlens, *rows)


def check_bound_values(num_keys: int, bounds: Bounds, tail: bool = False) -> None:
    """Checks the values of the bounds: always on a CPU; on a device, which the read would synchronise, under `tinyonn.debug()` only.

    With `tail`, rows after the last sequence may belong to none.
    """
    if not debug_enabled() and any(bound is not None and bound.device.type != "cpu" for bound in bounds):
        return
    cu_seqlens, key_start, key_end = bounds
    if cu_seqlens is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last > num_keys or (last < num_keys and not tail) or bool((cu_seqlens.diff() < 0).any()):
            most = "at most " if tail else ""
            raise ValueError(f"cu_seqlens must ascend from 0 to {most}{num_keys}, got {cu_seqlens.tolist()}.")
    bound = key_end if key_start is None else key_start
    if bound is None:
        return
    start = torch.zeros_like(bound) if key_start is None else key_start
    end = torch.full_like(bound, num_keys) if key_end is None else key_end
    # A start after the end is a row of padding alone, as at the beginning of decoding piece by piece.
    if bool(((start < 0) | (end < 0) | (end > num_keys)).any()):
        raise ValueError(f"key_start must be at least 0 and key_end 0 … {num_keys}, got {start.tolist()} and {end.tolist()}.")


def lengths_of(num_queries: int, num_keys: int, bounds: Bounds, device: torch.device) -> Tensor:
    """(B or 1, T or 1), number of keys of each query's sequence."""
    cu_seqlens, key_start, key_end = bounds
    if cu_seqlens is not None:
        place = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32, device=device)
        sequence = (torch.searchsorted(cu_seqlens, place, right=True) - 1).clamp(0, max(0, len(cu_seqlens) - 2))
        return cu_seqlens.diff()[sequence][None] if len(cu_seqlens) > 1 else torch.zeros_like(place)[None]
    end = torch.tensor([num_keys], device=device) if key_end is None else key_end
    return (end if key_start is None else end - key_start)[:, None]


def check_sizes(block_size: int, compress_size: int) -> None:
    for name, size in (("block_size", block_size), ("compress_size", compress_size)):
        check_int(name, size)
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16, got {block_size}.")
    if compress_size not in COMPRESS_SIZES or block_size % compress_size:
        raise ValueError(f"compress_size must be one of {COMPRESS_SIZES} that divides block_size {block_size}, got {compress_size}.")


def check_compressed(query: Tensor, key: Tensor, num_keys: int, compress_size: int) -> None:
    wanted, found = num_keys // compress_size, key.shape[1]
    if found != wanted:
        hint = order_hint(query, key)
        raise ValueError(f"key_compressed must have {wanted} keys, one for every {compress_size} of {num_keys}, got {found}{hint}.")


def check_temperature(temperature: float) -> float:
    check_number("temperature", temperature, above=0)
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be at least {MIN_TEMPERATURE:.3g}, the smallest normal float32, got {temperature:.3g}.")
    return float(temperature)


def check_tau_values(tau: Tensor) -> None:
    """ValueError for a tau out of range. Reads the whole tensor: for `tinyonn.debug()`. Rounding may lift a computed tau above 1."""
    if bool(((tau < 0) | (tau > 1 + 1e-5)).any()):
        raise ValueError(f"tau must be in [0, 1], got {tau.min().item():g} … {tau.max().item():g}.")


def check_max_blocks(max_blocks: int, forced_first: int, forced_local: int) -> None:
    check_size("max_blocks", max_blocks)
    check_size("forced_first", forced_first, 0)
    check_size("forced_local", forced_local)
    forced = forced_first + forced_local
    if max_blocks < forced:
        raise ValueError(f"max_blocks must be at least {forced}, the number of forced blocks, got {max_blocks}.")


def _as_int32(name: str, tensor: Tensor, query: Tensor, num_keys: int) -> Tensor:
    """Converts int64 to int32 on its device; values out of range stay out of range."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}.")
    check_same_device(name, tensor, query.device)
    return tensor if tensor.dtype == torch.int32 else tensor.clamp(-1, num_keys + 1).to(torch.int32)


def empty_lists(query: Tensor, num_kv: int, max_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias and soft_counts of an empty selection."""
    rows, dtype, device = (*query.shape[:2], num_kv), statistics_dtype(query.dtype), query.device
    return (
        torch.full((*rows, max_blocks), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros((*rows, max_blocks), dtype=dtype, device=device),
        torch.zeros(rows, dtype=dtype, device=device),
    )
