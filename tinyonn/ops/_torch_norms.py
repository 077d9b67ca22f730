"""L2 norms of blocks in plain torch, without intermediate overflow; on a CPU, one pass over memory and no copy of the whole tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import statistics_dtype

CHUNK_ELEMENTS = 1 << 18  # elements of half precision converted to float32 at a time, so that a chunk stays in the cache


def norms_into(x: Tensor, block_size: int, out: Tensor) -> None:
    """Writes the norm of every block of x (..., F) to out (..., ceil(F / block_size)), both of any strides."""
    full = x.shape[-1] // block_size
    if full:
        _blocks_into(x[..., : full * block_size].unflatten(-1, (full, block_size)), out[..., :full])
    if out.shape[-1] > full:
        _blocks_into(x[..., full * block_size :].unsqueeze(-2), out[..., full:])


def row_norms(x: Tensor) -> Tensor:
    """Norm of each row: (..., F) -> (...,); 0 for F = 0."""
    norms = torch.empty(x.shape[:-1], dtype=statistics_dtype(x.dtype), device=x.device)
    _blocks_into(x.unsqueeze(-2), norms.unsqueeze(-1))
    return norms


def _blocks_into(blocks: Tensor, out: Tensor) -> None:
    if blocks.numel() == 0:
        out.zero_()
    elif blocks.is_cuda:
        out.copy_(_scaled_norm(blocks.to(out.dtype)))  # one more pass over all blocks, but no synchronisation with the device
    elif blocks.dtype == out.dtype:
        torch.linalg.vector_norm(blocks, dim=-1, out=out)
        _mend(blocks, out)
    elif blocks.dim() == 2:
        _chunk_into(blocks, out)
    else:
        rows = blocks.shape[0]
        step = max(1, CHUNK_ELEMENTS * rows // blocks.numel())
        for start in range(0, rows, step):
            _chunk_into(blocks[start : start + step], out[start : start + step])


def _chunk_into(blocks: Tensor, out: Tensor) -> None:
    wide = blocks.to(out.dtype)
    torch.linalg.vector_norm(wide, dim=-1, out=out)
    if blocks.dtype != torch.float16:  # no square of a float16 leaves float32's range
        _mend(wide, out)


def _mend(blocks: Tensor, out: Tensor) -> None:
    """Recomputes the norms whose squares overflowed or lost digits by underflow."""
    info = torch.finfo(out.dtype)
    floor = math.sqrt(info.tiny / info.eps)
    low, high = torch.aminmax(out)
    if low.item() >= floor and high.item() < math.inf:
        return
    doubtful = (out < floor) | (out == math.inf)
    if bool(doubtful.any()):
        out[doubtful] = _scaled_norm(blocks[doubtful])


def _scaled_norm(blocks: Tensor) -> Tensor:
    """Norm as m · ‖block / m‖, where m is the largest magnitude of the block, so that every ratio is in [-1, 1]."""
    largest = torch.linalg.vector_norm(blocks, math.inf, dim=-1)
    divisor = torch.where((largest > 0) & (largest < math.inf), largest, 1)
    return torch.linalg.vector_norm(blocks / divisor.unsqueeze(-1), dim=-1) * divisor
