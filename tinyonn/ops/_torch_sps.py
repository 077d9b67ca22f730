"""SPS in plain torch: tokens a cache-sized chunk at a time, runs of equally wide layers in one call, float64 inside."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
from torch import Tensor

from tinyonn.reference.integrate_sps import RELATIVE_STD_FLOOR

CHUNK_ELEMENTS = 1 << 16


def integrate(activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, token_mask: Tensor | None, per_token: Tensor | None) -> Tensor:
    """Returns the sum over tokens (blocks,) float64; writes the scores to `per_token (tokens, blocks)` where given."""
    num_tokens, num_blocks = activation.shape
    total = torch.zeros(num_blocks, dtype=torch.float64, device=activation.device)
    if per_token is not None:
        per_token.fill_(float("nan"))
    runs = _equal_runs(group_offsets.tolist())
    step = max(1, CHUNK_ELEMENTS // max(1, num_blocks))
    for start in range(0, num_tokens, step):
        tokens = slice(start, start + step)
        a, g = activation[tokens].double(), grad_norm[tokens].double()
        missing = a.isnan() | g.isnan()
        if token_mask is not None:
            missing |= ~token_mask[tokens].unsqueeze(-1)
        scores = torch.empty_like(a)
        # Most chunks miss nothing and take the shorter path; on a GPU asking would stall it.
        gaps = missing if a.is_cuda or bool(missing.any()) else None
        for first, groups, width in runs:
            columns = slice(first, first + groups * width)
            view = (groups, width)
            present = None if gaps is None else ~gaps[:, columns].unflatten(-1, view)
            z = _standardise(a[:, columns].unflatten(-1, view), present)
            z -= _standardise(g[:, columns].unflatten(-1, view), present)
            scores[:, columns] = z.flatten(-2)
        total += scores.sum(dim=0)
        if per_token is not None:
            per_token[tokens] = scores if gaps is None else scores.masked_fill(gaps, float("nan"))
    return total


def _standardise(values: Tensor, present: Tensor | None) -> Tensor:
    """z over the last dimension, 0 where missing and where the spread is no more than rounding. Two passes."""
    if present is None:
        mean = values.mean(dim=-1, keepdim=True)
        deviation = values - mean
        variance = deviation.square().mean(dim=-1, keepdim=True)
    else:
        count = present.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = torch.where(present, values, 0).sum(dim=-1, keepdim=True) / count
        deviation = torch.where(present, values - mean, 0)
        variance = deviation.square().sum(dim=-1, keepdim=True) / count
    std = variance.sqrt_()
    flat = std <= RELATIVE_STD_FLOOR * mean.abs()
    return deviation.div_(std.masked_fill_(flat, 1)).masked_fill_(flat, 0)


def _equal_runs(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(first block, number of groups, blocks per group) of each run of adjacent groups of one width."""
    runs, first = [], 0
    for width, members in groupby(stop - start for start, stop in pairwise(bounds)):
        groups = sum(1 for _ in members)
        if width:
            runs.append((first, groups, width))
        first += groups * width
    return runs
