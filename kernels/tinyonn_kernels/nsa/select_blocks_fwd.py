"""Key blocks whose importance passes a threshold, as ascending lists.

    p[g, c] = e^(cap(scale · q_g · k_c) - lse_g)      share[b] = max(mean_g sum of p[g, c] over c in b · factor, e^-20)
    factor = 1, or M · compress / block where importance is relative
    z = log share   gap = (z - threshold) / temperature   c = clamp(gap, 0, 1)   gate = c²(3 - 2c)
    wanted: gate > 0 and wholly in the past, or forced (the first FIRST blocks and the LOCAL that end with the own one: gate 1)

M compressed keys that the query sees, S slots of a list, NB key blocks of a row. Each program holds the shares of a few queries in its own
scratch, NB floats per query. There are as many programs as the GPU runs at once, and each processes one tile after another. The slot of a
block is the number of kept blocks before it, so ordinary rows need no sort. A row with too many blocks finds the smallest share to keep by
bisection over the bits of positive floats, whose order is that of integers; ties go to the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ._common import (
    FAR,
    LOG2E,
    Geometry,
    bounds_of,
    cap_log2,
    capped,
    count_heads,
    dot,
    has_warpgroups,
    load_rows,
    unit_stride,
    width_of,
)

Z_FLOOR = tl.constexpr(2.061153622438558e-09)  # e^-20
RESIDENT, RESIDENT_REGISTERS = 3, 168  # programs of four warps that a multiprocessor holds, with this number of registers
TILE_ROWS = 64
STEP_TILE = tl.constexpr(512)  # queries times blocks of a step after the products, four to a thread
WIDE_TILE = tl.constexpr(1024)  # of a step of the bisection
MAX_QUERIES = 16  # a larger tile would need a large scratch for small groups


@triton.jit
def block_probabilities(
    q,
    k_ptr,
    lse_log2,
    first_row,
    block0,
    seen_row,
    most,
    scale_log2,
    stride_kt,
    RATIO: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """p (ROWS, BLOCKS * RATIO) of the blocks from `block0` on, their compressed keys, and scores in base 2.

    Each row sees its first `seen_row` keys.
    """
    c = block0 * RATIO + tl.arange(0, BLOCKS * RATIO)
    k = load_rows(k_ptr, (first_row + c).to(tl.int64), c < most, stride_kt, HEAD_DIM, WIDTH)
    scores = capped(dot(q, tl.trans(k), IEEE) * scale_log2, CAP)
    p = tl.exp2(scores - lse_log2[:, None])
    return tl.where(c[None, :] < seen_row[:, None], p, 0.0), k, scores


@triton.jit
def kinds_of(block, relative, active, BLOCK_SIZE: tl.constexpr, FIRST: tl.constexpr, LOCAL: tl.constexpr):
    """Whether each block is forced, and whether it is a past block that is not forced; both (queries, blocks)."""
    own = (relative // BLOCK_SIZE)[:, None]
    block = block[None, :]
    forced = active[:, None] & (block <= own) & ((block < FIRST) | (block > own - LOCAL))
    past = active[:, None] & ((block + 1) * BLOCK_SIZE <= relative[:, None] + 1)
    return forced, past & ~forced


@triton.jit
def factor_of(relative, GROUP: tl.constexpr, RATIO: tl.constexpr, COMPRESS: tl.constexpr, RELATIVE: tl.constexpr):
    """What the sum of p over a block and the group's heads is multiplied by; (queries, 1)."""
    if RELATIVE:
        # A query without visible keys has no mass, so its value is irrelevant.
        factor = tl.maximum((relative + 1) // COMPRESS, 1).to(tl.float32) / (RATIO * GROUP)
    else:
        factor = tl.full(relative.shape, 1.0 / GROUP, tl.float32)
    return factor[:, None]


def configs(IEEE: bool, WIDTH: int, GROUP: int, RATIO: int, ARCH: int, **_: object) -> list[triton.Config]:
    """Tiles whose products leave registers for three programs of a multiprocessor."""
    if IEEE:
        return [config(8 if WIDTH >= 128 else 4, 1, 255, BLOCKS=max(1, 16 // RATIO))]
    if WIDTH >= 256:
        return [config(8, 1, 255, BLOCKS=max(1, 32 // RATIO))]
    keys = 32 if WIDTH < 128 or GROUP & (GROUP - 1) == 0 else 16  # divisions by other groups take registers
    return [config(4, 2 if has_warpgroups(ARCH) else 1, RESIDENT_REGISTERS, BLOCKS=max(1, keys // RATIO))]


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE", "RATIO"])
@triton.jit
def _select_fwd_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    soft_ptr,
    over_ptr,
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
    scale_log2,
    q_strides,
    k_strides,
    stride_sb,
    threshold_strides,
    stride_cb,
    bounds_strides,
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
    stride_gb, stride_gt = bounds_strides
    COMPRESS: tl.constexpr = BLOCK_SIZE // RATIO
    STEP: tl.constexpr = STEP_TILE // QUERIES
    WIDE: tl.constexpr = WIDE_TILE // QUERIES
    per_head = tl.cdiv(num_queries, QUERIES)
    lane = tl.arange(0, QUERIES)
    scratch_ptr += tl.program_id(0).to(tl.int64) * QUERIES * row_blocks + lane[:, None] * row_blocks
    num_over = 0
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        batch = (tile // per_head // num_kv).to(tl.int64)
        head = tile // per_head % num_kv
        first_token = tile % per_head * QUERIES
        token = first_token + lane
        start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, token + before, token < num_queries, stride_gt)
        relative = token + before - start
        row = tl.arange(0, QUERIES * PADDED)
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
        factor = factor_of(relative, GROUP, RATIO, COMPRESS, RELATIVE)

        # Processes queries of one sequence at a time; a tile rarely contains two.
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
                p, _, _ = block_probabilities(
                    q, k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh, lse_log2, first_row, block0, seen_row,
                    (farthest + 1) // COMPRESS, scale_log2, stride_kt, RATIO, CAP, IEEE, HEAD_DIM, WIDTH, BLOCKS,
                )  # fmt: skip
                mass = tl.sum(tl.sum(tl.reshape(p, (QUERIES, PADDED, BLOCKS, RATIO)), axis=3), axis=1)
                block = block0 + tl.arange(0, BLOCKS)
                tl.store(scratch_ptr + block[None, :], tl.maximum(mass * factor, Z_FLOOR), mask=(block < num_blocks)[None, :])
            tl.debug_barrier()

            # Many threads hold the same share of the product's layout, so the rest is computed on shares that are loaded again.
            number = tl.zeros((QUERIES,), tl.int32)
            soft = tl.zeros((QUERIES,), tl.float32)
            for block0 in range(0, num_blocks, STEP):
                block = block0 + tl.arange(0, STEP)
                share = tl.load(scratch_ptr + block[None, :], mask=(block < num_blocks)[None, :], other=Z_FLOOR)
                forced, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
                gap = (tl.log(share) - threshold) / temperature
                number += tl.sum((forced | (past & (gap > 0))).to(tl.int32), axis=1)
                soft += tl.sum(tl.where(forced, 1.0, tl.where(past, tl.sigmoid(gap), 0.0)), axis=1)

            over = number > num_slots
            num_over += tl.sum(over.to(tl.int32))
            need = num_slots - tl.minimum(relative // BLOCK_SIZE + 1, FIRST + LOCAL)
            lowest = tl.where(over, 0, -1)  # bits of the smallest share that is kept
            ties = tl.zeros((QUERIES,), tl.int32)
            if tl.max(over.to(tl.int32)) > 0:
                # From here on, a share of 0 stands for a block that does not pass.
                tl.debug_barrier()
                for block0 in range(0, num_blocks, WIDE):
                    block = block0 + tl.arange(0, WIDE)
                    share = tl.load(scratch_ptr + block[None, :], mask=(block < num_blocks)[None, :], other=Z_FLOOR)
                    _, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
                    passes = past & (((tl.log(share) - threshold) / temperature) > 0)
                    tl.store(scratch_ptr + block[None, :], tl.where(passes, share, 0.0))
                tl.debug_barrier()
                # The last round counts the larger shares.
                for step in range(0, 32):
                    trial = tl.where(step < 31, lowest | (1 << tl.maximum(30 - step, 0)), lowest + 1)
                    reached = tl.zeros((QUERIES, WIDE), tl.int32)
                    for block0 in range(0, num_blocks, WIDE):
                        share = tl.load(scratch_ptr + (block0 + tl.arange(0, WIDE))[None, :])
                        reached += (share.to(tl.int32, bitcast=True) >= trial[:, None]).to(tl.int32)
                    reach = tl.sum(reached, axis=1)
                    lowest = tl.where(over & (step < 31) & (reach >= need), trial, lowest)
                    ties = need - reach
                tl.debug_barrier()

            pair = batch * stride_cb + token * num_kv + head
            kept_before = tl.zeros((QUERIES,), tl.int32)
            ties_before = tl.zeros((QUERIES,), tl.int32)
            for block0 in range(0, num_blocks, STEP):
                block = block0 + tl.arange(0, STEP)
                share = tl.load(scratch_ptr + block[None, :], mask=(block < num_blocks)[None, :], other=Z_FLOOR)
                forced, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
                gap = (tl.log(tl.maximum(share, Z_FLOOR)) - threshold) / temperature
                passes = past & (gap > 0) & (share > 0)
                bits = share.to(tl.int32, bitcast=True)
                tied = (passes & (bits == lowest[:, None])).to(tl.int32)
                fits = ties_before[:, None] + tl.cumsum(tied, axis=1) <= ties[:, None]
                kept = (forced | (passes & ((bits > lowest[:, None]) | ((tied > 0) & fits)))).to(tl.int32)
                slot = kept_before[:, None] + tl.cumsum(kept, axis=1) - 1
                place = pair[:, None] * num_slots + slot
                c = tl.minimum(gap, 1.0)
                log_gate = tl.where(forced, 0.0, 2.0 * tl.log(tl.where(passes, c, 1.0)) + tl.log(3.0 - 2.0 * tl.where(passes, c, 1.0)))
                mask = (kept > 0) & (slot < num_slots)
                tl.store(indices_ptr + place, tl.broadcast_to(block[None, :], (QUERIES, STEP)), mask=mask)
                tl.store(bias_ptr + place, log_gate, mask=mask)
                kept_before += tl.sum(kept, axis=1)
                ties_before += tl.sum(tied, axis=1)
            tl.store(counts_ptr + pair, tl.minimum(kept_before, num_slots), mask=active)
            tl.store(soft_ptr + pair, soft, mask=active)
            tl.debug_barrier()
            current = tl.min(tl.where(valid & (start > current), start, FAR))
    tl.store(over_ptr + tl.program_id(0), num_over)


def tile_queries(group: int, rows: int) -> dict[str, int]:
    """Queries of a tile, and rows of each: whole groups, padded to a power of two."""
    padded = triton.next_power_of_2(group)
    return {"PADDED": padded, "QUERIES": min(MAX_QUERIES, max(1, rows // padded))}


def program_count(tiles: int, device: torch.device, small: bool) -> int:
    """Number of programs: as many as a GPU runs at once, because each needs a scratch; `small` ones have four warps."""
    if device.type == "cpu":
        return min(tiles, 3)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return min(tiles, units * (RESIDENT if small else 4))


def select_blocks_fwd(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor,
    soft_counts: Tensor,
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
) -> Tensor:
    """Writes the listed places of indices and bias (B, T, K, S), and counts and soft_counts (B, T, K), except for padding.

    Returns the number of rows with too many blocks, by program. Lists are contiguous except for their batch stride.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return torch.zeros(1, dtype=torch.int32, device=query.device)
    query, key = unit_stride(query), unit_stride(key)
    group = heads // num_kv
    ratio = block_size // compress_size
    shape = tile_queries(group, TILE_ROWS // 2 if query.dtype == torch.float32 else TILE_ROWS)
    tiles = triton.cdiv(num_queries, shape["QUERIES"]) * count_heads(query, num_kv, geometry)
    programs = program_count(tiles, query.device, small=query.dtype != torch.float32 and width_of(dim) <= 128)
    wide = WIDE_TILE.value // shape["QUERIES"]
    row_blocks = triton.cdiv(triton.cdiv(num_keys, block_size), wide) * wide
    scratch = torch.empty((programs, shape["QUERIES"], row_blocks), dtype=torch.float32, device=query.device)
    over = torch.empty(programs, dtype=torch.int32, device=query.device)
    launch(
        _select_fwd_kernel,
        lambda meta: (programs,),
        query,
        key,
        lse,
        threshold,
        indices,
        counts,
        bias,
        soft_counts,
        over,
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
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        lse.stride(0),
        threshold.stride(),
        counts.stride(0),
        geometry.start.stride(),
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
    return over
