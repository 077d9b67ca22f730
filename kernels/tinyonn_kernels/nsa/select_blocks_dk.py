"""Gradients of the compressed keys in the selection (`select_blocks_fwd`).

    dk_c = scale · sum_g w[g, c] cap'[g, c] q_g,   w as in `select_blocks_dq`

Key-outer, over tiles of key blocks of one sequence and SPLITS parts of the queries that see them, with separate sums. Each program has a
scratch for the gradients of the lists and the masses of a step. Without atomics, every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ._common import (
    LOG2E,
    Geometry,
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
from .interval_attention_dkv import ENOUGH_PROGRAMS, MAX_SPLITS
from .select_blocks_dq import exchanged, gradient_of_mass, tile_rows
from .select_blocks_fwd import RESIDENT_REGISTERS, TILE_ROWS, block_probabilities, factor_of, kinds_of, tile_queries

MAX_SLOTS = 64  # of lists, loaded at once


def configs(IEEE: bool, WIDTH: int, QUERIES: int, RATIO: int, ARCH: int, **_: object) -> list[triton.Config]:
    if RATIO == 1 and QUERIES <= 4 and WIDTH == 128 and has_warpgroups(ARCH) and not IEEE:
        return [config(4, 1, RESIDENT_REGISTERS)]
    few_rows = not has_warpgroups(ARCH) and RATIO == 4 and WIDTH < 128  # four warps would compute them twice
    return [config(8 if IEEE else 2 if few_rows else 4, 1, 255)]


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE", "RATIO"])
@triton.jit
def _select_dk_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    dbias_ptr,
    dsoft_ptr,
    dk_ptr,
    scratch_ptr,
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
    q_strides,
    k_strides,
    stride_sb,
    threshold_strides,
    stride_cb,
    dk_strides,
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
    SLOTS: tl.constexpr,
):
    # One program owns the compressed keys of BLOCKS key blocks of one sequence and head, and one part of the queries that see them.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_hb, stride_ht, stride_hh = threshold_strides
    stride_split, stride_db = dk_strides
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
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    own_ptr = scratch_ptr + program.to(tl.int64) * 2 * QUERIES * BLOCKS
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
        factor = factor_of(relative, GROUP, RATIO, COMPRESS, RELATIVE)

        # Each gradient of the lists goes to its block's place in the program's scratch.
        tl.debug_barrier()
        tl.store(own_ptr + lane[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :], tl.zeros((QUERIES, BLOCKS), tl.float32))
        tl.debug_barrier()
        count = tl.load(counts_ptr + pair, mask=active, other=0)
        for slot0 in range(0, tl.max(count), SLOTS):
            slot = slot0 + tl.arange(0, SLOTS)[None, :]
            place = tl.load(indices_ptr + pair[:, None] * num_slots + slot, mask=slot < count[:, None], other=-1) - block0
            here = (place >= 0) & (place < BLOCKS)
            gradient = tl.load(dbias_ptr + pair[:, None] * num_slots + slot, mask=here, other=0.0)
            tl.store(own_ptr + lane[:, None] * BLOCKS + place, gradient, mask=here)

        p, _, scores = block_probabilities(
            q, k_ptr, lse_log2, first_row, block0, seen_row, most, scale_log2, stride_kt, RATIO, CAP, IEEE, HEAD_DIM, WIDTH, BLOCKS
        )
        _, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
        p = tl.reshape(p, (QUERIES, PADDED, BLOCKS, RATIO))
        mass = tl.sum(tl.sum(p, axis=3), axis=1)
        if ROWS >= 64:
            mass = exchanged(mass, own_ptr + QUERIES * BLOCKS, QUERIES, BLOCKS)
        else:
            tl.debug_barrier()
        listed = tl.load(own_ptr + lane[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :])
        _, dmass = gradient_of_mass(mass, listed, soft, threshold, factor, temperature, past)
        w = tl.reshape(p * dmass[:, None, :, None], (ROWS, BLOCKS * RATIO))
        if CAP > 0:
            w *= cap_slope(scores, CAP)
        dk += dot(tl.trans(w.to(q.dtype)), q, IEEE)

    c = block0 * RATIO + tl.arange(0, BLOCKS * RATIO)
    target = tl.program_id(1).to(tl.int64) * stride_split + batch * stride_db + ((first_row + c).to(tl.int64) * num_kv + head) * HEAD_DIM
    store_rows(dk_ptr, target, c < most, dk * scale, HEAD_DIM, WIDTH, False)


def tiles_of_sequences(geometry: Geometry, num_keys: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts every sequence into tiles of `size` positions: (B, tiles) start and end of the sequence, and index of the tile in it.

    Sequence i has at most len // size + 1 tiles, so places from start // size + i are unique; some places stay empty.
    """
    starts, ends = geometry.starts, geometry.ends
    if not geometry.packed:
        number = torch.arange(triton.cdiv(num_keys, size), dtype=torch.int32, device=starts.device).expand(starts.shape[0], -1)
        return starts.expand(number.shape).contiguous(), ends.expand(number.shape).contiguous(), number.contiguous()
    places = torch.arange(num_keys // size + starts.shape[1] + 1, dtype=torch.int32, device=starts.device)
    first = (starts // size)[0] + torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    sequence = (torch.searchsorted(first, places, right=True) - 1).clamp_(min=0)
    return starts[0][sequence], ends[0][sequence], places - first[sequence]


def select_blocks_dk(
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
    importance: str,
    forced_first: int,
    forced_local: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Gradient of the compressed keys, float32; launched over (tiles of key blocks, SPLITS, B * K)."""
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(key, dtype=torch.float32)
    query, key = unit_stride(query), unit_stride(key)
    ratio = block_size // compress_size
    group = heads // num_kv
    rows = tile_rows(query, group, ratio)
    shape = tile_queries(group, rows)
    keys = 16 if query.dtype == torch.float32 else 32 if rows < TILE_ROWS and width_of(dim) >= 128 else 64
    blocks = max(1, keys // ratio)
    start, end, number = tiles_of_sequences(geometry, num_keys, blocks * block_size)
    programs = start.shape[-1]
    pairs = count_heads(query, num_kv, geometry)
    splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // (programs * pairs), num_queries // (4 * shape["QUERIES"])))
    grad_key = torch.zeros((splits, *key.shape), dtype=torch.float32, device=key.device)
    scratch = torch.empty((programs * splits * pairs, 2, shape["QUERIES"], blocks), dtype=torch.float32, device=key.device)
    launch(
        _select_dk_kernel,
        lambda meta: (programs, splits, pairs),
        query,
        key,
        lse,
        threshold,
        indices,
        counts,
        grad_bias,
        grad_soft,
        grad_key,
        scratch,
        start,
        end,
        number * blocks,
        num_queries,
        num_kv,
        indices.shape[-1],
        geometry.before,
        temperature,
        scale,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        lse.stride(0),
        threshold.stride(),
        counts.stride(0),
        grad_key.stride()[:2],
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
        BLOCKS=blocks,
        SLOTS=min(MAX_SLOTS, triton.next_power_of_2(indices.shape[-1])),
        **shape,
    )
    return grad_key[0] if splits == 1 else grad_key.sum(0)
