"""L2 norms of feature blocks: `out[..., b] = row_scale[...] * ||x[..., block b]||`."""

from __future__ import annotations

import torch
from torch import Tensor


def block_norms(x: Tensor, block_size: int = 64, *, row_scale: Tensor | None = None) -> Tensor:
    """Norm of every block in float64, one block at a time; differentiated by autograd, with gradient 0 for a norm of 0.

    Args:
        x: (..., F).
        block_size: features per block; the last block may be shorter.
        row_scale: (...,), factor of each row's norms.

    Returns:
        (..., ceil(F / block_size)) float64.
    """
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-1], 0), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(block, dim=-1) for block in x.double().split(block_size, dim=-1)]
    stacked = torch.stack(norms, dim=-1)
    return stacked if row_scale is None else stacked * row_scale.double().unsqueeze(-1)
