"""SPS in plain torch: one cache-sized chunk of tokens at a time, one call per run of equally wide layers, computed in float64."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 16
RELATIVE_STD_FLOOR = 1e-6  # a standard deviation below this fraction of the mean is rounding error, and every z is 0


def integrate(activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, token_mask: Tensor | None, per_token: Tensor | None) -> Tensor:
    """Returns the sum over tokens, (blocks,) float64; writes the scores to `per_token` (tokens, blocks) unless it is None."""
    num_tokens, num_blocks = activation.shape
    total = torch.zeros(num_blocks, dtype=torch.float64, device=activation.device)
    runs = _equal_runs(group_offsets.tolist())
    step = max(1, CHUNK_ELEMENTS // max(1, num_blocks))
    for start in range(0, num_tokens, step):
        tokens = slice(start, start + step)
        a, g = (plane[tokens].to(torch.float64, copy=True) for plane in (activation, grad_norm))
        keep = None if token_mask is None else token_mask[tokens, None, None]
        for first, groups, width in runs:
            columns = slice(first, first + groups * width)
            view = (groups, width)
            scores, present = _scores(a[:, columns].unflatten(-1, view), g[:, columns].unflatten(-1, view), keep)
            total[columns] += scores.sum(dim=0).flatten()
            if per_token is not None:
                per_token[tokens, columns] = (scores if present is None else scores.masked_fill(~present, float("nan"))).flatten(-2)
    return total


def _scores(a: Tensor, g: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """z(a) - z(g) over the last dimension, 0 for missing blocks; and the mask of present blocks, None for all. Overwrites `a` and `g`."""
    present, root_count = None, a.new_tensor(a.shape[-1]).sqrt()
    a_mean, g_mean = a.mean(dim=-1, keepdim=True), g.mean(dim=-1, keepdim=True)
    # NaN in a mean shows that a block is missing, so complete layers need no further pass. On a GPU the test would synchronise.
    if keep is not None or a.is_cuda or bool((a_mean + g_mean).isnan().any()):
        present = ~(a.isnan() | g.isnan())
        if keep is not None:
            present &= keep
        count = present.sum(dim=-1, keepdim=True, dtype=torch.float64).clamp(min=1)
        root_count = count.sqrt()
        a_mean, g_mean = (torch.where(present, plane, 0).sum(dim=-1, keepdim=True) / count for plane in (a, g))
    scales = []
    for deviation, mean in ((a.sub_(a_mean), a_mean), (g.sub_(g_mean), g_mean)):
        if present is not None:
            deviation.masked_fill_(~present, 0)
        std = torch.linalg.vector_norm(deviation, dim=-1, keepdim=True) / root_count
        flat = std <= RELATIVE_STD_FLOOR * mean.abs()
        scales.append(std.masked_fill_(flat, torch.inf).reciprocal_())
    scores = a.mul_(scales[0]).addcmul_(g, scales[1], value=-1)
    # Again: an infinity makes the scale NaN, which must not reach missing blocks.
    return scores if present is None else scores.masked_fill_(~present, 0), present


def _equal_runs(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(first block, number of groups, blocks per group) of each run of adjacent groups of one width."""
    runs, first = [], 0
    for width, members in groupby(stop - start for start, stop in pairwise(bounds)):
        groups = sum(1 for _ in members)
        if width:
            runs.append((first, groups, width))
        first += groups * width
    return runs
