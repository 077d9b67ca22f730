"""Synergistic prediction scores summed over tokens.

    sps[t, b] = z(a[t, b]) - z(g[t, b]),   total[b] = sum_t sps[t, b]

a activation norms, g gradient norms, (T tokens, NB blocks). z standardises over the blocks of one layer that are present for one token,
with the population standard deviation; it is 0 if the standard deviation is at most 1e-6 of the mean. Two passes over a tile in
registers compute in float64, because one-pass float32 variances can be negative. Each chunk of tokens has its own row of partial sums,
added in a fixed order, so every run gives the same bits. The second and third pass of a layer wider than TILE read it again from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHUNKS = 64  # rows of partial sums
MIN_TILE, MAX_TILE = 128, 1024


@triton.jit
def _load_tile(a_ptr, g_ptr, block, end, stride_ab, stride_gb):
    """Both norms of the blocks before `end`, float64, and whether both are present, that is, not NaN."""
    inside = block < end
    missing = float("nan")
    a = tl.load(a_ptr + block * stride_ab, mask=inside, other=missing).to(tl.float64)
    g = tl.load(g_ptr + block * stride_gb, mask=inside, other=missing).to(tl.float64)
    return a, g, (a == a) & (g == g)


@triton.jit
def _scale_of(mean, variance):
    """1 / std, or 0 if the spread is only rounding error."""
    std = tl.sqrt(variance)
    flat = std <= 1e-6 * tl.abs(mean)
    return tl.where(flat, 0.0, 1.0 / tl.where(flat, 1.0, std))


@triton.jit
def _standardise(values, present, count):
    """z of the present values; 0 for the others."""
    mean = tl.sum(tl.where(present, values, 0.0)) / count
    deviation = tl.where(present, values - mean, 0.0)
    return deviation * _scale_of(mean, tl.sum(deviation * deviation) / count)


@triton.jit
def _integrate_sps_kernel(
    a_ptr,
    g_ptr,
    offsets_ptr,
    mask_ptr,
    partial_ptr,
    scores_ptr,
    num_tokens,
    num_blocks,
    tokens_per_chunk,
    stride_at,
    stride_ab,
    stride_gt,
    stride_gb,
    stride_m,
    HAS_MASK: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program owns one layer's blocks for one chunk of tokens.
    group = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + group).to(tl.int64)
    stop = tl.load(offsets_ptr + group + 1).to(tl.int64)
    partial_ptr += chunk * num_blocks
    first = chunk * tokens_per_chunk
    last = tl.minimum(first + tokens_per_chunk, num_tokens)
    lane = tl.arange(0, TILE)
    if stop - start <= TILE:
        block = start + lane
        total = tl.zeros((TILE,), tl.float64)
        for t in range(first, last):
            end = stop
            if HAS_MASK:
                end = tl.where(tl.load(mask_ptr + t * stride_m) != 0, stop, start)
            a, g, present = _load_tile(a_ptr + t * stride_at, g_ptr + t * stride_gt, block, end, stride_ab, stride_gb)
            count = tl.maximum(tl.sum(present.to(tl.int32)), 1).to(tl.float64)
            sps = _standardise(a, present, count) - _standardise(g, present, count)
            total += tl.where(present, sps, 0.0)
            if HAS_SCORES:
                tl.store(scores_ptr + t * num_blocks + block, tl.where(present, sps, float("nan")), mask=block < stop)
        tl.store(partial_ptr + block, total, mask=block < stop)
    else:
        for t in range(first, last):
            end = stop
            if HAS_MASK:
                end = tl.where(tl.load(mask_ptr + t * stride_m) != 0, stop, start)
            a_row, g_row = a_ptr + t * stride_at, g_ptr + t * stride_gt
            number = tl.zeros((TILE,), tl.int32)
            a_sum = tl.zeros((TILE,), tl.float64)
            g_sum = tl.zeros((TILE,), tl.float64)
            for tile in range(start, stop, TILE):
                a, g, present = _load_tile(a_row, g_row, tile + lane, end, stride_ab, stride_gb)
                number += present.to(tl.int32)
                a_sum += tl.where(present, a, 0.0)
                g_sum += tl.where(present, g, 0.0)
            count = tl.maximum(tl.sum(number), 1).to(tl.float64)
            a_mean = tl.sum(a_sum) / count
            g_mean = tl.sum(g_sum) / count
            a_square = tl.zeros((TILE,), tl.float64)
            g_square = tl.zeros((TILE,), tl.float64)
            for tile in range(start, stop, TILE):
                a, g, present = _load_tile(a_row, g_row, tile + lane, end, stride_ab, stride_gb)
                a_deviation = tl.where(present, a - a_mean, 0.0)
                g_deviation = tl.where(present, g - g_mean, 0.0)
                a_square += a_deviation * a_deviation
                g_square += g_deviation * g_deviation
            a_scale = _scale_of(a_mean, tl.sum(a_square) / count)
            g_scale = _scale_of(g_mean, tl.sum(g_square) / count)
            for tile in range(start, stop, TILE):
                block = tile + lane
                a, g, present = _load_tile(a_row, g_row, block, end, stride_ab, stride_gb)
                sps = tl.where(present, (a - a_mean) * a_scale - (g - g_mean) * g_scale, 0.0)
                # No other program writes this slice; each lane adds to its own values.
                target = partial_ptr + block
                tl.store(target, tl.load(target, mask=block < stop, other=0.0) + sps, mask=block < stop)
                if HAS_SCORES:
                    tl.store(scores_ptr + t * num_blocks + block, tl.where(present, sps, float("nan")), mask=block < stop)


def integrate_sps_fwd(
    activation: Tensor, grad_norm: Tensor, group_offsets: Tensor, token_mask: Tensor | None, scores: Tensor | None
) -> Tensor:
    """Returns (blocks,) float64; launched over (layers, chunks of tokens). Writes the contiguous `scores` if given.

    The mean layer width determines the tile, because the offsets' values stay on the device.
    """
    num_tokens, num_blocks = activation.shape
    num_groups = group_offsets.shape[0] - 1
    if num_tokens == 0 or num_blocks == 0:
        return torch.zeros(num_blocks, dtype=torch.float64, device=activation.device)
    tokens_per_chunk = max(8, triton.cdiv(num_tokens, MAX_CHUNKS))
    chunks = triton.cdiv(num_tokens, tokens_per_chunk)
    sums = torch.zeros((chunks, num_blocks), dtype=torch.float64, device=activation.device)
    tile = min(max(triton.next_power_of_2(triton.cdiv(2 * num_blocks, num_groups)), MIN_TILE), MAX_TILE)
    mask = None if token_mask is None else token_mask.view(torch.uint8)
    _integrate_sps_kernel[(num_groups, chunks)](
        activation,
        grad_norm,
        group_offsets,
        activation if mask is None else mask,
        sums,
        sums if scores is None else scores,
        num_tokens,
        num_blocks,
        tokens_per_chunk,
        *activation.stride(),
        *grad_norm.stride(),
        0 if mask is None else mask.stride(0),
        HAS_MASK=mask is not None,
        HAS_SCORES=scores is not None,
        TILE=tile,
        num_warps=tile // 128,
        maxnreg=128,  # by default, ptxas targets 64 registers on sm_100 and spills
    )
    return sums.sum(dim=0)
