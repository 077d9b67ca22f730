"""Gradients of the selection (`select_blocks_fwd`): of log gate in the lists, and of the soft counts.

    dgap = dbias · 6 (1 - c) / (c (3 - 2c)) [listed, 0 < c < 1] + dsoft · σ(gap) σ(-gap)     for past blocks that are not forced
    dz = dgap / temperature    dthreshold = -sum_b dz    dmass[b] = dz / mass[b] where above the floor, mass summed over the group
    w[g, c] = p[g, c] · dmass[b],  c in b    dlse[g] = -sum_c w    dq_g = scale · sum_c w k_c    dk_c = scale · sum_g w q_g

Importance is computed again from q, k and lse. The first kernel is query-outer; it spreads a tile's dbias over a scratch of the
program's own. The second is key-outer, over tiles of key blocks of one sequence and SPLITS parts of the queries that see them, with
sums of their own, and finds a block in a query's ascending list by bisection: no atomics, the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._nsa import LOG2E, Geometry, bounds_of, dot, load_rows, unit_stride, width_of
from .block_lists import lists
from .interval_attention_bwd import ENOUGH_PROGRAMS, MAX_SPLITS
from .interval_attention_fwd import SHAPES, example
from .select_blocks_fwd import FAR, Z_FLOOR, block_probabilities, kinds_of, program_count, tile_queries

TILE_ROWS = 32  # fewer than forward: probabilities and their gradients are in registers together


@triton.jit
def gradient_of_mass(
    p,
    listed,
    soft,
    threshold,
    uniform,
    temperature,
    past,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATIO: tl.constexpr,
):
    """dz (queries, blocks) and w (rows, keys), from the gradients of log gate (queries, blocks) and soft count (queries,)."""
    mass = tl.sum(tl.sum(tl.reshape(p, (QUERIES, PADDED, BLOCKS, RATIO)), axis=3), axis=1)
    share = tl.maximum(mass * uniform, Z_FLOOR)
    gap = (tl.log(share) - threshold) / temperature
    c = tl.minimum(tl.maximum(gap, 0.0), 1.0)
    inside = past & (c > 0) & (c < 1)
    slope = tl.where(inside, 6.0 * (1.0 - c) / tl.where(inside, c * (3.0 - 2.0 * c), 1.0), 0.0)
    # σ(-gap) is 1 - σ(gap) without the cancellation.
    dz = (listed * slope + tl.where(past, tl.sigmoid(gap) * tl.sigmoid(-gap), 0.0) * soft[:, None]) / temperature
    above = mass * uniform > Z_FLOOR
    dmass = tl.where(above, dz / tl.where(above, mass, 1.0), 0.0)
    w = tl.reshape(p, (QUERIES, PADDED, BLOCKS, RATIO)) * dmass[:, None, :, None]
    return dz, tl.reshape(w, (QUERIES * PADDED, BLOCKS * RATIO))


@triton.jit
def _select_bwd_queries_kernel(
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
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_sb,
    stride_hb,
    stride_ht,
    stride_hh,
    stride_cb,
    stride_db,
    stride_dt,
    stride_gb,
    stride_gt,
    SCORES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns one tile after another: QUERIES queries of one key/value head, PADDED rows each.
    COMPRESS: tl.constexpr = BLOCK_SIZE // RATIO
    ROWS: tl.constexpr = QUERIES * PADDED
    per_head = tl.cdiv(num_queries, QUERIES)
    lane = tl.arange(0, QUERIES)
    scratch_ptr += tl.program_id(0).to(tl.int64) * QUERIES * row_blocks + lane * row_blocks
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
        uniform = (tl.maximum((relative + 1) // COMPRESS, 1).to(tl.float32) / (RATIO * GROUP))[:, None]

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
                p, k = block_probabilities(
                    q, k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh, lse_log2, first_row, block0, seen_row,
                    (farthest + 1) // COMPRESS, scale_log2, stride_kt, RATIO, IEEE, HEAD_DIM, WIDTH, BLOCKS,
                )  # fmt: skip
                block = block0 + tl.arange(0, BLOCKS)
                _, past = kinds_of(block, relative, active, BLOCK_SIZE)
                listed = tl.load(scratch_ptr[:, None] + block[None, :], mask=active[:, None] & (block < num_blocks)[None, :], other=0.0)
                dz, w = gradient_of_mass(p, listed, soft, threshold, uniform, temperature, past, QUERIES, PADDED, BLOCKS, RATIO)
                dthreshold -= tl.sum(dz, axis=1)
                if SCORES:
                    dlse -= tl.sum(w, axis=1)
                    dq += dot(w.to(k.dtype), k, IEEE)
            current = tl.min(tl.where(valid & (start > current), start, FAR))

        tl.store(dthreshold_ptr + pair, dthreshold, mask=token < num_queries)
        if SCORES:
            tl.store(dlse_ptr + stat, dlse, mask=inside)
            feature = tl.arange(0, WIDTH)
            target = dq_ptr + (batch * stride_db + row_token * stride_dt + query_head * HEAD_DIM)[:, None] + feature[None, :]
            mask = inside[:, None] & (feature < HEAD_DIM)[None, :]
            dq *= scale
            if ACCUMULATE:
                dq += tl.load(target, mask=mask, other=0.0)
            tl.store(target, dq, mask=mask)
        tl.debug_barrier()


@triton.jit
def _select_bwd_keys_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    dbias_ptr,
    dsoft_ptr,
    dk_ptr,
    tile_start_ptr,
    tile_end_ptr,
    tile_block_ptr,
    num_queries,
    num_kv,
    num_slots,
    before,
    temperature,
    scale,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_sb,
    stride_hb,
    stride_ht,
    stride_hh,
    stride_cb,
    stride_split,
    stride_db,
    PACKED: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PROBES: tl.constexpr,
):
    # One program owns the compressed keys of BLOCKS key blocks of one sequence and head, and one part of the queries that see them.
    COMPRESS: tl.constexpr = BLOCK_SIZE // RATIO
    ROWS: tl.constexpr = QUERIES * PADDED
    batch = (tl.program_id(2) // num_kv).to(tl.int64)
    head = tl.program_id(2) % num_kv
    tile = batch * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(tile_end_ptr + tile)
    block0 = tl.load(tile_block_ptr + tile)
    first_row = start * 0
    if PACKED:
        first_row = start // COMPRESS
    most = tl.maximum(end - start, 0) // COMPRESS
    first = tl.maximum(start + block0 * BLOCK_SIZE + COMPRESS - 1 - before, 0)
    stop = tl.minimum(end - before, num_queries)
    part = tl.cdiv(tl.maximum(stop - first, 0), tl.num_programs(1) * QUERIES) * QUERIES
    first += part * tl.program_id(1)
    stop = tl.minimum(first + part, stop)
    block = block0 + tl.arange(0, BLOCKS)
    lane = tl.arange(0, QUERIES)
    row = tl.arange(0, ROWS)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    dk = tl.zeros((BLOCKS * RATIO, WIDTH), tl.float32)
    for first_token in range(first, stop, QUERIES):
        token = first_token + lane
        active = token < stop
        relative = token + before - start
        row_token = first_token + row // PADDED
        inside = (row_token < stop) & (row % PADDED < GROUP)
        seen_row = tl.where(inside, (row_token + before - start + 1) // COMPRESS, 0)
        row_token = row_token.to(tl.int64)
        query_head = head * GROUP + row % PADDED
        q = load_rows(q_ptr + batch * stride_qb, row_token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
        stat = batch * stride_sb + row_token * (num_kv * GROUP) + query_head
        lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        token = token.to(tl.int64)
        at = batch * stride_hb + token * stride_ht + head * stride_hh
        threshold = tl.load(threshold_ptr + at, mask=active, other=0.0).to(tl.float32)[:, None]
        pair = batch * stride_cb + token * num_kv + head
        soft = tl.load(dsoft_ptr + pair, mask=active, other=0.0)
        uniform = (tl.maximum((relative + 1) // COMPRESS, 1).to(tl.float32) / (RATIO * GROUP))[:, None]

        # The first slot of a list that is not before these blocks; from there on at most BLOCKS of them are listed.
        count = tl.load(counts_ptr + pair, mask=active, other=0)
        slot = tl.zeros((QUERIES,), tl.int32)
        for probe in tl.static_range(PROBES):
            probed = slot + (1 << (PROBES - 1 - probe)) - 1
            value = tl.load(indices_ptr + pair * num_slots + probed, mask=probed < count, other=FAR)
            slot = tl.where(value < block0, probed + 1, slot)
        listed = tl.zeros((QUERIES, BLOCKS), tl.float32)
        for _ in range(0, tl.minimum(tl.max(count - slot), BLOCKS)):
            value = tl.load(indices_ptr + pair * num_slots + slot, mask=slot < count, other=-1)
            gradient = tl.load(dbias_ptr + pair * num_slots + slot, mask=slot < count, other=0.0)
            listed += tl.where(value[:, None] == block[None, :], gradient[:, None], 0.0)
            slot += 1

        p, _ = block_probabilities(
            q, k_ptr, lse_log2, first_row, block0, seen_row, most, scale_log2, stride_kt, RATIO, IEEE, HEAD_DIM, WIDTH, BLOCKS
        )
        _, past = kinds_of(block, relative, active, BLOCK_SIZE)
        _, w = gradient_of_mass(p, listed, soft, threshold, uniform, temperature, past, QUERIES, PADDED, BLOCKS, RATIO)
        dk += dot(tl.trans(w.to(q.dtype)), q, IEEE)

    c = block0 * RATIO + tl.arange(0, BLOCKS * RATIO)
    feature = tl.arange(0, WIDTH)
    rows = tl.program_id(1) * stride_split + batch * stride_db + ((first_row + c).to(tl.int64) * num_kv + head) * HEAD_DIM
    mask = (c < most)[:, None] & (feature < HEAD_DIM)[None, :]
    tl.store(dk_ptr + rows[:, None] + feature[None, :], dk * scale, mask=mask)


def _tiles(dtype: torch.dtype, width: int, ratio: int) -> dict[str, int]:
    # Left alone, ptxas aims at fewer registers than there are, and spills to get there.
    if dtype == torch.float32:
        return {"BLOCKS": max(1, 16 // ratio), "num_warps": 8, "num_stages": 1, "maxnreg": 255}
    return {"BLOCKS": max(1, (32 if width >= 128 else 64) // ratio), "num_warps": 4, "num_stages": 1, "maxnreg": 255}


def select_blocks_bwd_queries(
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
    scale: float,
    *,
    accumulate: bool = False,
) -> None:
    """Writes grad_threshold (B, T, K), grad_lse (B, T, H) and grad_query (B, T, H, D), or adds to the last; the latter two, or none.

    counts, grad_soft, grad_threshold have one batch stride, which times S is that of indices and grad_bias; within, all are contiguous.
    """
    batch, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key = unit_stride(query), unit_stride(key)
    ratio = block_size // compress_size
    group = heads // num_kv
    shape = tile_queries(group, TILE_ROWS) | _tiles(query.dtype, width_of(dim), ratio)
    tiles = triton.cdiv(num_queries, shape["QUERIES"]) * batch * num_kv
    programs = program_count(tiles, query.device)
    row_blocks = triton.cdiv(triton.cdiv(num_keys, block_size), 4) * 4
    scratch = torch.empty((programs, shape["QUERIES"], row_blocks), dtype=torch.float32, device=query.device)
    _select_bwd_queries_kernel[(programs,)](
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
        *query.stride()[:3],
        *key.stride()[:3],
        lse.stride(0),
        *threshold.stride(),
        counts.stride(0),
        *((0, 0) if grad_query is None else grad_query.stride()[:2]),
        *geometry.start.stride(),
        SCORES=grad_query is not None,
        ACCUMULATE=accumulate,
        PACKED=geometry.packed,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        RATIO=ratio,
        BLOCK_SIZE=block_size,
        **shape,
    )


def tiles_of_sequences(geometry: Geometry, num_keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every sequence cut in tiles of `size` positions: (B, tiles) start and end of its sequence, and the tile's number in it.

    Sequence i has at most len // size + 1 tiles, so start // size + i keeps them apart; some places hold none.
    """
    starts, ends = geometry.starts, geometry.ends
    if not geometry.packed:
        number = torch.arange(triton.cdiv(num_keys, size), dtype=torch.int32, device=starts.device).expand(starts.shape[0], -1)
        return starts.expand(number.shape).contiguous(), ends.expand(number.shape).contiguous(), number.contiguous()
    places = torch.arange(num_keys // size + starts.shape[1] + 1, dtype=torch.int32, device=starts.device)
    first = (starts // size)[0] + torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    sequence = (torch.searchsorted(first, places, right=True) - 1).clamp_(min=0)
    return starts[0][sequence], ends[0][sequence], places - first[sequence]


def select_blocks_bwd_keys(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    indices: Tensor,
    counts: Tensor,
    grad_bias: Tensor,
    grad_soft: Tensor,
    geometry: Geometry,
    num_keys: int,
    temperature: float,
    block_size: int,
    compress_size: int,
    scale: float,
) -> Tensor:
    """The gradient of the compressed keys, float32; launched over (tiles of key blocks, SPLITS, B * K)."""
    batch, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(key, dtype=torch.float32)
    query, key = unit_stride(query), unit_stride(key)
    ratio = block_size // compress_size
    group = heads // num_kv
    shape = tile_queries(group, TILE_ROWS) | _tiles(query.dtype, width_of(dim), ratio)
    start, end, number = tiles_of_sequences(geometry, num_keys, shape["BLOCKS"] * block_size)
    programs = start.shape[-1]
    splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // (programs * batch * num_kv), num_queries // (4 * shape["QUERIES"])))
    grad_key = torch.zeros((splits, *key.shape), dtype=torch.float32, device=key.device)
    _select_bwd_keys_kernel[(programs, splits, batch * num_kv)](
        query,
        key,
        lse,
        threshold,
        indices,
        counts,
        grad_bias,
        grad_soft,
        grad_key,
        start,
        end,
        number * shape["BLOCKS"],
        num_queries,
        num_kv,
        indices.shape[-1],
        geometry.before,
        temperature,
        scale,
        scale * LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        lse.stride(0),
        *threshold.stride(),
        counts.stride(0),
        *grad_key.stride()[:2],
        PACKED=geometry.packed,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        RATIO=ratio,
        BLOCK_SIZE=block_size,
        PROBES=indices.shape[-1].bit_length(),
        **shape,
    )
    return grad_key[0] if splits == 1 else grad_key.sum(0)


def offered(arch: int) -> dict[str, Callable[[], object]]:
    """bfloat16 to D = 256, float32 to D = 128, any group; compressed keys of 64 or 16."""

    def launch(dtype: torch.dtype, dim: int, heads: int, size: int, which: str) -> object:
        query, key, geometry = example(dtype, dim, heads, size)
        lse = torch.empty(query.shape[:3], device="meta")
        rows = torch.empty((1, 4096, 2), device="meta")
        indices, counts, grad_bias = lists(query, 2, 16)
        inputs = (query, key, lse, rows, indices, counts, grad_bias, rows)
        sizes = (geometry, 4096, 1.0, 64, size, 0.1)
        if which == "queries":
            grad_query = torch.empty(query.shape, device="meta")
            return select_blocks_bwd_queries(*inputs, rows, grad_query, lse, *sizes, accumulate=True)
        return select_blocks_bwd_keys(*inputs, *sizes)

    return {
        f"{which}-{label}-compress{size}": partial(launch, dtype, dim, heads, size, which)
        for label, dtype, dim, heads in SHAPES
        for size in (64, 16)
        for which in ("queries", "keys")
    }
