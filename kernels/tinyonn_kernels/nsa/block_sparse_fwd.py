"""Causal attention of each query to the key blocks of its list.

    s[j] = cap(scale · q · k[j]) + bias[slot],  j in block indices[slot], j <= place of the query
    lse = log sum_j e^s[j],   out = sum_j e^(s[j] - lse) v[j]

cap(s) = softcap · tanh(s / softcap), or s. B batch, T queries, K key/value heads with G query heads each, S slots of a list. Query-outer:
the heads of a group share a list and are rows of one tile. Where rows are left, neighbouring queries share the tile, and each masks blocks
that only the others list (`block_lists`). Online softmax in base 2, float32 accumulation. Blocks longer than a tile are read
in parts. Sinks (`ops/nsa/_sinks.py`) join lse and out. Out, times a weight per row, can be added to a sum of other branches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ._common import (
    BOTTOM,
    LOG2E,
    Geometry,
    bounds_of,
    cap_log2,
    capped,
    count_heads,
    dot,
    join_sink,
    load_rows,
    load_weight,
    softmax_step,
    store_rows,
    store_sum,
    unit_stride,
    width_of,
)
from .block_lists import block_at, merge_lists, tile_of


def configs(IEEE: bool, WIDTH: int, ROWS: int, BLOCK_SIZE: int, CAP: float, GROUP: int, **_: object) -> list[triton.Config]:
    """Tiles of keys; tiles with few rows need few warps."""
    if IEEE:
        keys, warps = (32 if ROWS <= 32 and WIDTH < 128 else 16), (4 if ROWS * WIDTH <= 2048 else 8)
        return [config(warps, 1, 255, KEYS=min(keys, BLOCK_SIZE))]
    keys, warps = (64 if WIDTH <= 128 else 32), (4 if ROWS * WIDTH <= 8192 else 8)
    offered = [config(warps, 2, KEYS=min(keys, BLOCK_SIZE))]
    crowded = CAP > 0 and WIDTH > 64  # two warps have no registers left for the cap
    if WIDTH <= 128 and ROWS <= 32 and not crowded:
        # Nor have they for 64 keys beside divisions by a group that is no power of 2.
        offered += [config(2, 3, KEYS=min(keys, BLOCK_SIZE)) for keys in ((64, 32) if GROUP & (GROUP - 1) == 0 else (32,))]
    return offered


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE"], changed=("sum_ptr",))
@triton.jit
def _block_sparse_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    blocks_ptr,
    members_ptr,
    lengths_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    weight_ptr,
    added_ptr,
    sum_ptr,
    sinks_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_kv,
    num_slots,
    before,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    weight_strides,
    added_strides,
    sum_strides,
    stride_sb,
    stride_cb,
    stride_lb,
    bounds_strides,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns QUERIES neighbouring queries of one key/value head: rows are (query, head) pairs, QUERIES * GROUP of ROWS.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_vb, stride_vt, stride_vh = v_strides
    stride_ob, stride_ot = out_strides
    stride_wb, stride_wt, stride_wh = weight_strides
    stride_ab, stride_at = added_strides
    stride_mb, stride_mt = sum_strides
    stride_gb, stride_gt = bounds_strides
    batch = (tl.program_id(1) // num_kv).to(tl.int64)
    head = tl.program_id(1) % num_kv
    row = tl.arange(0, ROWS)
    query = row // GROUP
    token = tl.program_id(0) * QUERIES + query
    inside = (row < QUERIES * GROUP) & (token < num_queries)
    query_head = head * GROUP + row % GROUP
    place = token + before
    start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, place, inside, stride_gt)
    token = token.to(tl.int64)
    # counts, indices and bias are contiguous rows: (B, T, K) of `num_slots` each.
    pair = batch * stride_cb + token * num_kv + head
    entry = batch * stride_lb + tl.program_id(0).to(tl.int64) * num_kv + head
    length = tl.load(lengths_ptr + entry) * tl.max(valid.to(tl.int32))
    blocks_ptr += entry * (QUERIES * num_slots)
    members_ptr += entry * (QUERIES * num_slots)
    origin = tl.max(start)
    last = tl.max(tl.where(valid, place, -1))

    q = load_rows(q_ptr + batch * stride_qb, token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    top = tl.full((ROWS,), BOTTOM, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    rank = tl.zeros((ROWS,), tl.int32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    for step in range(0, length * PARTS):
        first, listed = block_at(blocks_ptr, members_ptr, step // PARTS, origin, query, inside, QUERIES, BLOCK_SIZE)
        n = first + step % PARTS * KEYS + tl.arange(0, KEYS)
        k = load_rows(k_ptr, n.to(tl.int64), n <= last, stride_kt, HEAD_DIM, WIDTH)
        scores = capped(dot(q, tl.trans(k), IEEE) * scale_log2, CAP)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + pair * num_slots + rank, mask=listed, other=0.0)
            scores += (bias.to(tl.float32) * 1.4426950408889634)[:, None]
            rank += tl.where(step % PARTS == PARTS - 1, listed.to(tl.int32), 0)
        visible = listed[:, None] & (n[None, :] <= place[:, None])
        p, top, total, keep = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
        v = load_rows(v_ptr, n.to(tl.int64), n <= last, stride_vt, HEAD_DIM, WIDTH)
        mixed = mixed * keep[:, None] + dot(p.to(v.dtype), v, IEEE)

    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    mixed = mixed / safe[:, None]
    lse = tl.where(seen, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    if HAS_SINKS:
        lse, share = join_sink(lse, sinks_ptr, query_head, inside)
        mixed *= share[:, None]
    tl.store(lse_ptr + batch * stride_sb + token * (num_kv * GROUP) + query_head, lse, mask=inside)
    feature = query_head * HEAD_DIM
    store_rows(out_ptr, batch * stride_ob + token * stride_ot + feature, inside, mixed, HEAD_DIM, WIDTH, False)
    if HAS_SUM:
        mixed *= load_weight(weight_ptr, batch * stride_wb + token * stride_wt + query_head * stride_wh, inside, True, ROWS)[:, None]
        target, added = batch * stride_mb + token * stride_mt + feature, batch * stride_ab + token * stride_at + feature
        store_sum(sum_ptr, target, added_ptr, added, inside, mixed, HEAD_DIM, WIDTH, True)


def block_sparse_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    block_size: int,
    scale: float,
    softcap: float | None,
    *,
    sinks: Tensor | None = None,
    weight: Tensor | None = None,
    added: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Writes out (B, T, H, D) and lse (B, T, H) float32; launched over (tiles, B * K). Lists are contiguous within a batch row.

    With `weight` (B, T, H), `added` and `total` (B, T, H, D), it also writes total = added + weight · out; both may be the same tensor.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    group = heads // num_kv
    pairs = count_heads(query, num_kv, geometry)
    tile = tile_of(query, group)
    merged = merge_lists(indices, counts, geometry, tile.queries, block_size)
    grid = (triton.cdiv(num_queries, tile.queries), pairs)
    launch(
        _block_sparse_fwd_kernel,
        lambda meta: grid,
        query,
        key,
        value,
        merged.blocks,
        merged.members,
        merged.lengths,
        counts if bias is None else bias,
        out,
        lse,
        lse if weight is None else weight,
        out if added is None else added,
        out if total is None else total,
        lse if sinks is None else sinks,
        geometry.start,
        geometry.end,
        num_queries,
        num_kv,
        indices.shape[-1],
        geometry.before,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        out.stride()[:2],
        (0, 0, 0) if weight is None else weight.stride(),
        (0, 0) if added is None else added.stride()[:2],
        (0, 0) if total is None else total.stride()[:2],
        lse.stride(0),
        counts.stride(0),
        merged.lengths.stride(0),
        geometry.start.stride(),
        HAS_BIAS=bias is not None,
        CAP=cap_log2(softcap),
        HAS_SUM=total is not None,
        HAS_SINKS=sinks is not None,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        QUERIES=tile.queries,
        ROWS=tile.rows,
        BLOCK_SIZE=block_size,
    )
