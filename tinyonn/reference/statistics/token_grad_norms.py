"""Per-token gradient norms from explicit gradients of every token."""

from __future__ import annotations

import torch
from torch import Tensor


def token_grad_norms(inputs: Tensor, grad_output: Tensor, block_size: int | None = 64) -> Tensor:
    """Frobenius norm of each block of rows of `delta_t x_t^T`, the gradient of a linear layer's weight due to token t alone.

    Args:
        inputs: (..., in_features).
        grad_output: (..., out_features).
        block_size: features per block; None for the whole weight.

    Returns:
        (..., ceil(out_features / block_size)) float64, or (...,) for `block_size=None`.
    """
    per_token = torch.einsum("...o,...i->...oi", grad_output.double(), inputs.double())
    if block_size is None:
        return torch.linalg.matrix_norm(per_token)
    if per_token.shape[-2] == 0:
        return per_token.new_zeros((*per_token.shape[:-2], 0))
    blocks = per_token.split(block_size, dim=-2)
    return torch.stack([torch.linalg.matrix_norm(block) for block in blocks], dim=-1)
