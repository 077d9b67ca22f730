"""Checks and shapes that the ops of DynNSA share.

B batch, T queries of Tk positions (the last ones), H query heads, K key/value heads, D head dim, M compressed keys
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._debug import debug_enabled
from .._dispatch import check_float, check_same_device, choose_impl, statistics_dtype

COMPRESS_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
MAX_TRITON_FLOAT32_DIM = 128  # rows of queries, keys and gradients of more do not fit shared memory
AUTOCAST_FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what autocast changes; it leaves float64
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny  # what is smaller loses digits in float32, or is 0 there


class Bounds(NamedTuple):
    """Where sequences begin and end: packed in one row, or between padding."""

    cu_seqlens: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None


def choose_nsa_impl(impl: str, query: Tensor) -> str:
    """`choose_impl`, where `auto` leaves to torch what the kernels do not take."""
    wide = query.dtype == torch.float32 and query.shape[-1] > MAX_TRITON_FLOAT32_DIM
    if wide and impl == "auto":
        return "torch"
    if wide and impl == "triton":
        raise ValueError(
            f"query must have at most {MAX_TRITON_FLOAT32_DIM} dimensions a head in float32 with impl='triton', got {query.shape[-1]}: "
            "use float16 or bfloat16 (to 256), or impl='torch'."
        )
    return choose_impl(impl, query)


def in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors that differ in precision in that of autocast, as torch's own attention takes them; others as they came.

    A projection under autocast gives bfloat16, a rotation or a norm behind it float32.
    """
    if not all(isinstance(tensor, Tensor) and tensor.dtype in AUTOCAST_FLOATS for tensor in tensors):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_query(query: Tensor) -> None:
    check_float("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must have shape (B, T, H, D), got {tuple(query.shape)}.")
    if not 1 <= query.shape[3] <= MAX_HEAD_DIM or query.shape[2] < 1:
        raise ValueError(f"query must have at least one head of 1 … {MAX_HEAD_DIM} dimensions, got shape {tuple(query.shape)}.")


def check_keys(query: Tensor, name: str, key: Tensor, value_name: str, value: Tensor | None) -> None:
    """(B, ·, K, D), K dividing H; `value` of the same shape."""
    check_like(query, name, key)
    batch, _, heads, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"{name} must have shape ({batch}, T, K, {dim}), got {tuple(key.shape)}.")
    if key.shape[2] < 1 or heads % key.shape[2]:
        raise ValueError(f"{name} must have a number of heads that divides query's {heads}, got {key.shape[2]}{order_hint(query, key)}.")
    if value is not None:
        check_like(query, value_name, value)
        if value.shape != key.shape:
            raise ValueError(f"{value_name} must have shape {tuple(key.shape)}, got {tuple(value.shape)}.")


def order_hint(query: Tensor, key: Tensor) -> str:
    """For an error about shapes that would fit if tensors were (B, H, T, D)."""
    wide = query.shape[2] > query.shape[1] or key.shape[2] > key.shape[1]  # more heads than tokens
    if not wide or key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        return ""
    return ": tensors are (B, T, H, D) here; transpose(1, 2) those in scaled_dot_product_attention's order (B, H, T, D)"


def check_like(query: Tensor, name: str, tensor: Tensor) -> None:
    check_float(name, tensor)
    check_same_device(name, tensor, query.device)
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must be {query.dtype}, got {tensor.dtype}.")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> None:
    """A floating-point tensor of this shape on the query's device, whatever its precision."""
    check_float(name, tensor)
    check_same_device(name, tensor, query.device)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")


def checked_bounds(
    query: Tensor, key: Tensor, num_keys: int, cu_seqlens: Tensor | None, key_start: Tensor | None, key_end: Tensor | None
) -> Bounds:
    """The bounds as int32; their values are read by `check_bound_values` alone."""
    batch, num_queries = query.shape[:2]
    if not isinstance(num_keys, (int, torch.SymInt)) or isinstance(num_keys, bool):
        raise TypeError(f"num_keys must be an int, got {type(num_keys).__name__}.")
    if num_queries > num_keys:
        hint = order_hint(query, key)
        raise ValueError(f"query must have at most as many tokens as there are keys, {num_keys}, got {num_queries}{hint}.")
    if cu_seqlens is not None:
        if key_start is not None or key_end is not None:
            raise ValueError("key_start and key_end must be None together with cu_seqlens.")
        if batch != 1 or num_queries != num_keys:
            raise ValueError(
                f"cu_seqlens must come with one row of as many queries as keys, got {batch} rows, {num_queries} queries, {num_keys} keys."
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


def check_bound_values(num_keys: int, bounds: Bounds) -> None:
    """Reads the bounds: on a CPU always, on a device, where that would wait for it, under `tinyonn.debug()`."""
    if not debug_enabled() and any(bound is not None and bound.device.type != "cpu" for bound in bounds):
        return
    cu_seqlens, key_start, key_end = bounds
    if cu_seqlens is not None and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_keys or bool((cu_seqlens.diff() < 0).any())):
        raise ValueError(f"cu_seqlens must ascend from 0 to {num_keys}, got {cu_seqlens.tolist()}.")
    bound = key_end if key_start is None else key_start
    if bound is None:
        return
    start = torch.zeros_like(bound) if key_start is None else key_start
    end = torch.full_like(bound, num_keys) if key_end is None else key_end
    # A start behind the end is a row of padding alone: one that is decoded piece by piece begins so.
    if bool(((start < 0) | (end < 0) | (end > num_keys)).any()):
        raise ValueError(f"key_start must be at least 0 and key_end 0 … {num_keys}, got {start.tolist()} and {end.tolist()}.")


def lengths_of(num_queries: int, num_keys: int, bounds: Bounds, device: torch.device) -> Tensor:
    """(B or 1, T or 1) keys of the sequence that holds each query."""
    cu_seqlens, key_start, key_end = bounds
    if cu_seqlens is not None:
        place = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32, device=device)
        sequence = (torch.searchsorted(cu_seqlens, place, right=True) - 1).clamp(0, max(0, len(cu_seqlens) - 2))
        return cu_seqlens.diff()[sequence][None] if len(cu_seqlens) > 1 else torch.zeros_like(place)[None]
    end = torch.tensor([num_keys], device=device) if key_end is None else key_end
    return (end if key_start is None else end - key_start)[:, None]


def check_sizes(block_size: int, compress_size: int) -> None:
    for name, size in (("block_size", block_size), ("compress_size", compress_size)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}.")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 16, got {block_size}.")
    if compress_size not in COMPRESS_SIZES or block_size % compress_size:
        raise ValueError(f"compress_size must be one of {COMPRESS_SIZES} that divides block_size {block_size}, got {compress_size}.")


def check_compressed(query: Tensor, key: Tensor, num_keys: int, compress_size: int) -> None:
    wanted, found = num_keys // compress_size, key.shape[1]
    if found != wanted:
        hint = order_hint(query, key)
        raise ValueError(f"key_compressed must hold {wanted} keys, one for every {compress_size} of {num_keys}, got {found}{hint}.")


def check_positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return float(value)


def check_temperature(temperature: float) -> float:
    if check_positive("temperature", temperature) < MIN_TEMPERATURE:
        raise ValueError(f"temperature must be at least {MIN_TEMPERATURE:.3g}, the smallest normal float32, got {temperature:.3g}.")
    return float(temperature)


def check_tau_values(tau: Tensor) -> None:
    """For `tinyonn.debug()`: reads the whole tensor. What the ops compute may be past 1 by a rounding."""
    if bool(((tau < 0) | (tau > 1 + 1e-5)).any()):
        raise ValueError(f"tau must be in [0, 1], got {tau.min().item():g} … {tau.max().item():g}.")


def check_max_blocks(max_blocks: int) -> None:
    if not isinstance(max_blocks, int) or isinstance(max_blocks, bool):
        raise TypeError(f"max_blocks must be an int, got {type(max_blocks).__name__}.")
    if max_blocks < 3:
        raise ValueError(f"max_blocks must be at least 3, the forced ones, got {max_blocks}.")


def scale_of(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else check_positive("scale", scale)


def _as_int32(name: str, tensor: Tensor, query: Tensor, num_keys: int) -> Tensor:
    """int64 becomes int32 on its device; what is out of range stays so."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}.")
    check_same_device(name, tensor, query.device)
    return tensor if tensor.dtype == torch.int32 else tensor.clamp(-1, num_keys + 1).to(torch.int32)


def check_window(window: int) -> None:
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window must be an int, got {type(window).__name__}.")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")


def empty_lists(query: Tensor, num_kv: int, max_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts as they are where nothing is selected."""
    rows, dtype, device = (*query.shape[:2], num_kv), statistics_dtype(query.dtype), query.device
    return (
        torch.full((*rows, max_blocks), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros((*rows, max_blocks), dtype=dtype, device=device),
        torch.zeros(rows, dtype=dtype, device=device),
    )
