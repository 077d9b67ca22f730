"""Gradients of the compressed keys in the selection (`select_blocks_fwd`).

    dk_c = scale · sum_g w[g, c] cap'[g, c] q_g,   w as in `select_blocks_dq`

Key-outer, over tiles of key blocks of one sequence and SPLITS parts of the queries that see them, with separate sums. Bisection finds a
block in a query's ascending list. Without atomics, every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ._common import FAR, LOG2E, Geometry, cap_log2, cap_slope, count_heads, dot, load_rows, store_rows, unit_stride, width_of
from .interval_attention_dkv import ENOUGH_PROGRAMS, MAX_SPLITS
from .select_blocks_dq import TILE_ROWS, gradient_of_mass
from .select_blocks_fwd import block_probabilities, factor_of, kinds_of, tile_queries


def configs(IEEE: bool, **_: object) -> list[triton.Config]:
    return [config(8 if IEEE else 4, 1, 255)]


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
    PROBES: tl.constexpr,
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

        # First slot of the list that is not before these blocks; at most BLOCKS of them follow.
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

        p, _, scores = block_probabilities(
            q, k_ptr, lse_log2, first_row, block0, seen_row, most, scale_log2, stride_kt, RATIO, CAP, IEEE, HEAD_DIM, WIDTH, BLOCKS
        )
        _, past = kinds_of(block, relative, active, BLOCK_SIZE, FIRST, LOCAL)
        _, w = gradient_of_mass(p, listed, soft, threshold, factor, temperature, past, QUERIES, PADDED, BLOCKS, RATIO)
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
    shape = tile_queries(group, TILE_ROWS)
    keys = 16 if query.dtype == torch.float32 else 32 if width_of(dim) >= 128 else 64
    blocks = max(1, keys // ratio)
    start, end, number = tiles_of_sequences(geometry, num_keys, blocks * block_size)
    programs = start.shape[-1]
    pairs = count_heads(query, num_kv, geometry)
    splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // (programs * pairs), num_queries // (4 * shape["QUERIES"])))
    grad_key = torch.zeros((splits, *key.shape), dtype=torch.float32, device=key.device)
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
        PROBES=indices.shape[-1].bit_length(),
        **shape,
    )
    return grad_key[0] if splits == 1 else grad_key.sum(0)
