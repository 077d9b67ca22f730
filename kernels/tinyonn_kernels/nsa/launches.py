"""Launches over tensors without data that cover every configuration of the kernels of DynNSA, for the resources tool.

bfloat16 up to D = 256 and float32 up to D = 128, with one and with several queries per tile; some of them with a softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._tune import compiled_for
from ._common import Geometry
from .block_lists import merge_lists
from .block_sparse_dkv import block_sparse_attention_dkv
from .block_sparse_dq import block_sparse_attention_dq
from .block_sparse_fwd import block_sparse_attention_fwd
from .interval_attention_dkv import interval_attention_dkv
from .interval_attention_dq import interval_attention_dq
from .interval_attention_fwd import interval_attention_fwd
from .select_blocks_dk import select_blocks_dk
from .select_blocks_dq import select_blocks_dq
from .select_blocks_fwd import select_blocks_fwd

TOKENS, KV_HEADS, SLOTS, BLOCK_SIZE = 4096, 2, 16, 64

# label, dtype, D, H
SHAPES = [
    (f"{str(dtype).removeprefix('torch.')}-D{dim}-G{heads // KV_HEADS}", dtype, dim, heads)
    for dtype, dims in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128)))
    for dim in dims
    for heads in ((32, 16, 8, 6) if dim == 128 and dtype == torch.bfloat16 else (32, 6) if dim == 128 else (32,))
]
SOFTCAPPED = ("bfloat16-D128-G3", "bfloat16-D128-G16", "bfloat16-D256-G16")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed() -> Geometry:
    bounds = _empty(1, TOKENS, dtype=torch.int32)
    return Geometry(bounds, bounds, 0, True, bounds, bounds[:, :2], bounds[:, :2])


def _example(dtype: torch.dtype, dim: int, heads: int, keys_per_row: int, branch: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, lse and the weight of a branch."""
    query = _empty(1, TOKENS, heads, dim, dtype=dtype)
    key = _empty(1, TOKENS // keys_per_row, KV_HEADS, dim, dtype=dtype)
    return query, key, _empty(1, TOKENS, heads), _empty(1, TOKENS, heads, 3, dtype=dtype)[..., branch]


def _lists() -> tuple[Tensor, Tensor, Tensor]:
    """indices, counts, bias."""
    rows = (1, TOKENS, KV_HEADS)
    return _empty(*rows, SLOTS, dtype=torch.int32), _empty(*rows, dtype=torch.int32), _empty(*rows, SLOTS)


def _sinks(heads: int, softcap: float | None) -> Tensor | None:
    """Sinks where there is a softcap, so that both are covered."""
    return None if softcap is None else _empty(heads)


def _merge(queries: int) -> None:
    indices, counts, _ = _lists()
    merge_lists(indices, counts, _packed(), queries, BLOCK_SIZE)


def _interval(dtype: torch.dtype, dim: int, heads: int, compressed: bool, softcap: float | None = None) -> None:
    query, key, lse, weight = _example(dtype, dim, heads, 64 if compressed else 1)
    out, entropy, grad_lse = _empty(*query.shape), lse if compressed else None, lse if compressed else None
    rest = (_packed(), 64, 0.1, softcap)
    options = {"compressed": compressed, "weight": weight, "sinks": _sinks(heads, softcap), "accumulate": not compressed}
    interval_attention_fwd(query, key, key, out, lse, entropy, *rest, **options)
    target = query if compressed else out  # the last branch writes the gradient
    interval_attention_dq(query, key, key, lse, query, weight, grad_lse, lse, target, *rest, compressed=compressed, added=out)
    interval_attention_dkv(query, key, key, lse, query, weight, grad_lse, lse, *rest, compressed=compressed)


def _block_sparse(dtype: torch.dtype, dim: int, heads: int, softcap: float | None = None) -> None:
    query, key, lse, weight = _example(dtype, dim, heads, 1, branch=1)
    inputs = (query, key, key, *_lists())
    grads = (lse, lse, query, weight)
    grad_query, grad_key, grad_bias = _empty(*query.shape), _empty(*key.shape), _lists()[2]
    rest = (_packed(), BLOCK_SIZE, 0.1, softcap)
    sum_of = {"weight": weight, "added": grad_query, "total": query, "sinks": _sinks(heads, softcap)}
    block_sparse_attention_fwd(*inputs, torch.empty_like(query), lse, *rest, **sum_of)
    block_sparse_attention_dq(*inputs, *grads, grad_query, grad_bias, *rest, out=query, product=lse)
    block_sparse_attention_dkv(*inputs, *grads, grad_key, grad_key, *rest)


def _select(dtype: torch.dtype, dim: int, heads: int, compress_size: int, softcap: float | None = None) -> None:
    query, key, lse, _ = _example(dtype, dim, heads, compress_size)
    rows = _empty(1, TOKENS, KV_HEADS)  # thresholds and soft counts, and their gradients
    inputs = (query, key, lse, rows, *_lists(), rows)
    sizes = (_packed(), TOKENS, 1.0, BLOCK_SIZE, compress_size, "share", 1, 2, 0.1, softcap)
    select_blocks_fwd(*inputs, *sizes)
    select_blocks_dq(*inputs, rows, _empty(*query.shape), lse, *sizes, accumulate=True)
    select_blocks_dk(*inputs, *sizes)


def offered(arch: int) -> dict[str, Callable[[], None]]:
    """The same launches on every architecture, with its configurations."""
    launches: dict[str, Callable[[], None]] = {f"{number} queries": partial(_merge, number) for number in (2, 4, 5, 8, 16)}
    for label, *shape in SHAPES:
        caps = {label: None} | ({f"{label}-softcap": 50.0} if label in SOFTCAPPED else {})
        for name, softcap in caps.items():
            own = {"softcap": softcap}
            launches[name] = partial(_block_sparse, *shape, **own)
            launches |= {f"{name}-{kind}": partial(_interval, *shape, kind == "compressed", **own) for kind in ("window", "compressed")}
            launches |= {f"{name}-compress{size}": partial(_select, *shape, size, **own) for size in (64, 16)}
    return compiled_for(arch, launches)
