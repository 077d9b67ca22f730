"""Gradients of queries and thresholds in the selection (`select_blocks_fwd`), from those of log gate in the lists and of soft counts.

    dgap = dbias · 6 (1 - c) / (c (3 - 2c)) [listed, 0 < c < 1] + dsoft · σ(gap) σ(-gap)     for past blocks that are not forced
    dz = dgap / temperature    dthreshold = -sum_b dz    dmass[b] = dz / mass[b] above the floor, mass summed over the group
    w[g, c] = p[g, c] · dmass[b],  c in b    dlse[g] = -sum_c w    dq_g = scale · sum_c w cap' k_c

Importance is recomputed from q, k and lse. Query-outer; each program scatters the dbias of a tile into its own scratch, whose end holds the
masses of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import architecture, config, launch, tuned
from ._common import (
    FAR,
    LOG2E,
    Geometry,
    bounds_of,
    cap_log2,
    cap_slope,
    count_heads,
    dot,
    has_warpgroups,
    load_rows,
    store_rows,
    unit_stride,
    width_of,
)
from .select_blocks_fwd import TILE_ROWS, Z_FLOOR, block_probabilities, factor_of, kinds_of, program_count, tile_queries

MAX_BLOCKS = 64  # of a step


def tile_rows(query: Tensor, group: int, ratio: int) -> int:
    """Rows of a tile: 64, of a warpgroup, where registers suffice."""
    fits = query.dtype != torch.float32 and width_of(query.shape[-1]) <= 128 and group & (group - 1) == 0
    simple = (group >= 16) + (ratio == 1)  # few queries a tile, no sums within a block
    if fits and simple >= (1 if has_warpgroups(architecture(query)) else 2):
        return TILE_ROWS
    return TILE_ROWS // 4 if query.dtype == torch.float32 and width_of(query.shape[-1]) >= 128 else TILE_ROWS // 2


@triton.jit
def gradient_of_mass(mass, listed, soft, threshold, factor, temperature, past):
    """dz and dmass (queries, blocks), from the gradients of log gate, `listed`, and of the soft count, `soft` (queries,)."""
    share = tl.maximum(mass * factor, Z_FLOOR)
    gap = (tl.log(share) - threshold) / temperature
    c = tl.minimum(tl.maximum(gap, 0.0), 1.0)
    inside = past & (c > 0) & (c < 1)
    slope = tl.where(inside, 6.0 * (1.0 - c) / tl.where(inside, c * (3.0 - 2.0 * c), 1.0), 0.0)
    # σ(-gap) is 1 - σ(gap) without the cancellation.
    dz = (listed * slope + tl.where(past, tl.sigmoid(gap) * tl.sigmoid(-gap), 0.0) * soft[:, None]) / temperature
    above = mass * factor > Z_FLOOR
    return dz, tl.where(above, dz / tl.where(above, mass, 1.0), 0.0)


@triton.jit
def exchanged(mass, own_ptr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr):
    """The same values (queries, blocks), one to a thread: many threads hold the same sum over rows of a product."""
    place = own_ptr + tl.arange(0, QUERIES)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    tl.debug_barrier()
    tl.store(place, mass)
    tl.debug_barrier()
    return tl.load(place)


def configs(IEEE: bool, WIDTH: int, QUERIES: int, PADDED: int, RATIO: int, ARCH: int, **_: object) -> list[triton.Config]:
    if IEEE:
        return [config(8, 1, 255, BLOCKS=max(1, 16 // RATIO))]
    small = WIDTH < 128 and QUERIES * PADDED < TILE_ROWS
    few = RATIO == 1 and QUERIES <= 4 and WIDTH == 128 and has_warpgroups(ARCH)  # queries and sums, which take registers
    blocks = max(1, (MAX_BLOCKS if small or few else MAX_BLOCKS // 2) // RATIO)
    return [config(4, 1, 255, BLOCKS=blocks)]


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE", "RATIO"], changed=("dq_ptr",))
@triton.jit
def _select_dq_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    dbias_ptr,
    dsoft_ptr,
    dthreshold_ptr,
    dq_ptr,
    dlse_ptr,
    scratch_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_kv,
    num_tiles,
    num_slots,
    row_blocks,
    before,
    temperature,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    stride_sb,
    threshold_strides,
    stride_cb,
    dq_strides,
    bounds_strides,
    SCORES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RELATIVE: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
):
    # One program owns one tile after another: QUERIES queries of one key/value head, PADDED rows each.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_hb, stride_ht, stride_hh = threshold_strides
    stride_db, stride_dt = dq_strides
    stride_gb, stride_gt = bounds_strides
    COMPRESS: tl.constexpr = BLOCK_SIZE // RATIO
    ROWS: tl.constexpr = QUERIES * PADDED
    per_head = tl.cdiv(num_queries, QUERIES)
    lane = tl.arange(0, QUERIES)
    scratch_ptr += tl.program_id(0).to(tl.int64) * QUERIES * (row_blocks + BLOCKS)
    own_ptr = scratch_ptr + QUERIES * row_blocks
    scratch_ptr += lane * row_blocks
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        batch = (tile // per_head // num_kv).to(tl.int64)
        head = tile // per_head % num_kv
        first_token = tile % per_head * QUERIES
        token = first_token + lane
        start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, token + before, token < num_queries, stride_gt)
        relative = token + before - start
        row = tl.arange(0, ROWS)
        row_token = first_token + row // PADDED
        inside = (row_token < num_queries) & (row % PADDED < GROUP)
        row_place = row_token + before
        row_start, row_valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, row_place, inside, stride_gt)
        row_token = row_token.to(tl.int64)
        query_head = head * GROUP + row % PADDED
        q = load_rows(q_ptr + batch * stride_qb, row_token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
        stat = batch * stride_sb + row_token * (num_kv * GROUP) + query_head
        lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        token = token.to(tl.int64)
        at = batch * stride_hb + token * stride_ht + head * stride_hh
        threshold = tl.load(threshold_ptr + at, mask=valid, other=0.0).to(tl.float32)[:, None]
        pair = batch * stride_cb + token * num_kv + head
        soft = tl.load(dsoft_ptr + pair, mask=valid, other=0.0)
        factor = factor_of(relative, GROUP, RATIO, COMPRESS, RELATIVE)

        most_blocks = tl.max(tl.where(valid, relative, -1)) // BLOCK_SIZE + 1
        for block0 in range(0, most_blocks, BLOCKS):
            block = block0 + tl.arange(0, BLOCKS)
            mask = (lane >= 0)[:, None] & (block < row_blocks)[None, :]
            tl.store(scratch_ptr[:, None] + block[None, :], tl.zeros((QUERIES, BLOCKS), tl.float32), mask=mask)
        tl.debug_barrier()
        count = tl.load(counts_ptr + pair, mask=valid, other=0)
        for slot in range(0, tl.max(count)):
            block = tl.load(indices_ptr + pair * num_slots + slot, mask=slot < count, other=0)
            tl.store(scratch_ptr + block, tl.load(dbias_ptr + pair * num_slots + slot, mask=slot < count, other=0.0), mask=slot < count)
        tl.debug_barrier()

        dthreshold = tl.zeros((QUERIES,), tl.float32)
        dlse = tl.zeros((ROWS,), tl.float32)
        dq = tl.zeros((ROWS, WIDTH), tl.float32)
        current = tl.min(tl.where(valid, start, FAR))
        while current < FAR:
            active = valid & (start == current)
            farthest = tl.max(tl.where(active, relative, 0))
            num_blocks = farthest // BLOCK_SIZE + 1
            first_row = current * 0
            if PACKED:
                first_row = current // COMPRESS
            seen_row = tl.where(row_valid & (row_start == current), (row_place - current + 1) // COMPRESS, 0)
            for block0 in range(0, num_blocks, BLOCKS):
                p, k, scores = block_probabilities(
                    q, k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh, lse_log2, first_row, block0, seen_row,
                    (farthest + 1) // COMPRESS, scale_log2, stride_kt, RATIO, CAP, IEEE, HEAD_DIM, WIDTH, BLOCKS,
                )  # fmt: skip
                block = block0 + tl.arange(0, BLOCKS)
                _, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
                listed = tl.load(scratch_ptr[:, None] + block[None, :], mask=active[:, None] & (block < num_blocks)[None, :], other=0.0)
                p = tl.reshape(p, (QUERIES, PADDED, BLOCKS, RATIO))
                mass = tl.sum(tl.sum(p, axis=3), axis=1)
                if ROWS >= 64:
                    mass = exchanged(mass, own_ptr, QUERIES, BLOCKS)
                dz, dmass = gradient_of_mass(mass, listed, soft, threshold, factor, temperature, past)
                w = tl.reshape(p * dmass[:, None, :, None], (ROWS, BLOCKS * RATIO))
                dthreshold -= tl.sum(dz, axis=1)
                if SCORES:
                    dlse -= tl.sum(w, axis=1)
                    if CAP > 0:
                        w *= cap_slope(scores, CAP)
                    dq += dot(w.to(k.dtype), k, IEEE)
            current = tl.min(tl.where(valid & (start > current), start, FAR))

        tl.store(dthreshold_ptr + pair, dthreshold, mask=token < num_queries)
        if SCORES:
            tl.store(dlse_ptr + stat, dlse, mask=inside)
            target = batch * stride_db + row_token * stride_dt + query_head * HEAD_DIM
            store_rows(dq_ptr, target, inside, dq * scale, HEAD_DIM, WIDTH, ACCUMULATE)
        tl.debug_barrier()


def select_blocks_dq(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    indices: Tensor,
    counts: Tensor,
    grad_bias: Tensor,
    grad_soft: Tensor,
    grad_threshold: Tensor,
    grad_query: Tensor | None,
    grad_lse: Tensor | None,
    geometry: Geometry,
    num_keys: int,
    temperature: float,
    block_size: int,
    compress_size: int,
    importance: str,
    forced_first: int,
    forced_local: int,
    scale: float,
    softcap: float | None,
    *,
    accumulate: bool = False,
) -> None:
    """Writes grad_threshold (B, T, K), grad_lse (B, T, H), and writes or adds to grad_query (B, T, H, D); grad_lse, grad_query: or None.

    counts, grad_soft and grad_threshold share one batch stride; times S, it is that of indices and grad_bias. All are contiguous within.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key = unit_stride(query), unit_stride(key)
    ratio = block_size // compress_size
    group = heads // num_kv
    shape = tile_queries(group, tile_rows(query, group, ratio))
    tiles = triton.cdiv(num_queries, shape["QUERIES"]) * count_heads(query, num_kv, geometry)
    programs = program_count(tiles, query.device, small=False)
    row_blocks = triton.cdiv(triton.cdiv(num_keys, block_size), 4) * 4
    scratch = torch.empty((programs, shape["QUERIES"], row_blocks + MAX_BLOCKS), dtype=torch.float32, device=query.device)
    launch(
        _select_dq_kernel,
        lambda meta: (programs,),
        query,
        key,
        lse,
        threshold,
        indices,
        counts,
        grad_bias,
        grad_soft,
        grad_threshold,
        grad_threshold if grad_query is None else grad_query,
        grad_threshold if grad_lse is None else grad_lse,
        scratch,
        geometry.start,
        geometry.end,
        num_queries,
        num_kv,
        tiles,
        indices.shape[-1],
        row_blocks,
        geometry.before,
        temperature,
        scale,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        lse.stride(0),
        threshold.stride(),
        counts.stride(0),
        (0, 0) if grad_query is None else grad_query.stride()[:2],
        geometry.start.stride(),
        SCORES=grad_query is not None,
        ACCUMULATE=accumulate,
        PACKED=geometry.packed,
        CAP=cap_log2(softcap),
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        RATIO=ratio,
        BLOCK_SIZE=block_size,
        RELATIVE=importance == "relative",
        FIRST=forced_first,
        LOCAL=forced_local,
        **shape,
    )
