"""Synergistic prediction scores, one token and one layer at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

RELATIVE_STD_FLOOR = 1e-6  # a standard deviation below this fraction of the mean is rounding error, and every z is 0


def integrate_sps(
    activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SPS = z(activation norm) - z(grad norm), z over the blocks of one layer that are present for one token.

    Args:
        activation: (tokens, blocks); NaN for a missing block.
        grad_norm: (tokens, blocks); a block missing in one plane counts as missing in both.
        group_offsets: (layers + 1,), first block of each layer, then `blocks`.
        token_mask: (tokens,) bool; False ignores a token.

    Returns:
        Sum over tokens (blocks,), and scores (tokens, blocks), NaN for missing blocks; both float64.
    """
    scores = torch.full(activation.shape, float("nan"), dtype=torch.float64, device=activation.device)
    total = torch.zeros(activation.shape[1], dtype=torch.float64, device=activation.device)
    bounds = group_offsets.tolist()
    for token in range(activation.shape[0]):
        if token_mask is not None and not token_mask[token]:
            continue
        for start, stop in pairwise(bounds):
            a, g = activation[token, start:stop].double(), grad_norm[token, start:stop].double()
            present = ~(a.isnan() | g.isnan())
            sps = _z(a[present]) - _z(g[present])
            scores[token, start:stop][present] = sps
            total[start:stop][present] += sps
    return total, scores


def _z(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values
    mean = values.mean()
    deviation = values - mean
    std = deviation.square().mean().sqrt()
    return torch.zeros_like(values) if std <= RELATIVE_STD_FLOOR * mean.abs() else deviation / std
