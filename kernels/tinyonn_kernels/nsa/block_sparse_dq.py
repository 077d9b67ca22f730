"""Gradients of the queries and biases of attention to listed key blocks (`block_sparse_fwd`).

    p = e^(s - lse)   ds[j] = p[j] (dO · v[j] - shift),   shift = out · dO - dlse
    dq = scale · sum_j ds[j] cap'[j] k[j]     dbias[slot] = sum over the block's keys and the group's heads of ds

Query-outer, with the tiles of forward.
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
    bounds_of,
    cap_log2,
    cap_slope,
    capped,
    count_heads,
    dot,
    has_warpgroups,
    load_rows,
    load_weight,
    store_rows,
    unit_stride,
    width_of,
)
from .block_lists import block_at, merge_lists, tile_of


@triton.jit
def sum_of_query(values, query, QUERIES: tl.constexpr):
    """(rows,) sum of `values` over all rows of the same query."""
    if QUERIES == 1:
        return tl.sum(values) + tl.zeros_like(values)
    else:
        return tl.sum(tl.where(query[:, None] == query[None, :], values[None, :], 0.0), axis=1)


def configs(IEEE: bool, WIDTH: int, ROWS: int, BLOCK_SIZE: int, GROUP: int, ARCH: int, **_: object) -> list[triton.Config]:
    if IEEE:
        return [config(4 if ROWS * WIDTH <= 1024 else 8, 1, 255, KEYS=16)]
    if ROWS == 64 and WIDTH == 128 and GROUP & (GROUP - 1) == 0 and has_warpgroups(ARCH):
        return [config(4, 2, KEYS=min(64, BLOCK_SIZE))]
    keys, warps = (64 if WIDTH <= 64 else 32), (4 if ROWS * WIDTH <= 8192 else 8)
    offered = [config(warps, 2, KEYS=min(keys, BLOCK_SIZE)) if WIDTH <= 128 else config(warps, 1, 255, KEYS=min(keys, BLOCK_SIZE))]
    if WIDTH <= 128 and ROWS <= 32:
        offered += [config(4, 2, KEYS=min(64, BLOCK_SIZE)), config(2, 2, KEYS=min(32, BLOCK_SIZE))]
    return offered


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE"])
@triton.jit
def _block_sparse_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    blocks_ptr,
    members_ptr,
    lengths_ptr,
    bias_ptr,
    lse_ptr,
    shift_ptr,
    dq_ptr,
    dbias_ptr,
    weight_ptr,
    out_ptr,
    product_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_kv,
    num_slots,
    before,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
    out_strides,
    stride_sb,
    weight_strides,
    stride_cb,
    stride_lb,
    bounds_strides,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OUT: tl.constexpr,
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
    stride_ob, stride_ot, stride_oh = do_strides
    stride_db, stride_dt = dq_strides
    stride_rb, stride_rt = out_strides
    stride_wb, stride_wt, stride_wh = weight_strides
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
    pair = batch * stride_cb + token * num_kv + head
    entry = batch * stride_lb + tl.program_id(0).to(tl.int64) * num_kv + head
    length = tl.load(lengths_ptr + entry) * tl.max(valid.to(tl.int32))
    blocks_ptr += entry * (QUERIES * num_slots)
    members_ptr += entry * (QUERIES * num_slots)
    origin = tl.max(start)
    last = tl.max(tl.where(valid, place, -1))

    q = load_rows(q_ptr + batch * stride_qb, token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr + batch * stride_ob, token * stride_ot + query_head * stride_oh, inside, 1, HEAD_DIM, WIDTH)
    stat = batch * stride_sb + token * (num_kv * GROUP) + query_head
    lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=0.0) * 1.4426950408889634
    weight = load_weight(weight_ptr, batch * stride_wb + token * stride_wt + query_head * stride_wh, inside, HAS_WEIGHT, ROWS)
    if HAS_OUT:
        out = load_rows(out_ptr, batch * stride_rb + token * stride_rt + query_head * HEAD_DIM, inside, 1, HEAD_DIM, WIDTH)
        product = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)
        shift = weight * product
        tl.store(product_ptr + stat, product, mask=inside)
        tl.store(shift_ptr + stat, shift, mask=inside)
    else:
        shift = tl.load(shift_ptr + stat, mask=inside, other=0.0)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS,), tl.float32)
    rank = tl.zeros((ROWS,), tl.int32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    for step in range(0, length * PARTS):
        part = step % PARTS
        first, listed = block_at(blocks_ptr, members_ptr, step // PARTS, origin, query, inside, QUERIES, BLOCK_SIZE)
        n = first + part * KEYS + tl.arange(0, KEYS)
        k = load_rows(k_ptr, n.to(tl.int64), n <= last, stride_kt, HEAD_DIM, WIDTH)
        v = load_rows(v_ptr, n.to(tl.int64), n <= last, stride_vt, HEAD_DIM, WIDTH)
        raw = capped(dot(q, tl.trans(k), IEEE) * scale_log2, CAP)
        scores = raw
        if HAS_BIAS:
            bias = tl.load(bias_ptr + pair * num_slots + rank, mask=listed, other=0.0)
            scores += (bias.to(tl.float32) * 1.4426950408889634)[:, None]
        visible = listed[:, None] & (n[None, :] <= place[:, None])
        p = tl.where(visible, tl.exp2(scores - lse_log2[:, None]), 0.0)
        ds = p * (weight[:, None] * dot(do, tl.trans(v), IEEE) - shift[:, None])
        if HAS_BIAS:
            dbias = tl.where(part == 0, 0.0, dbias) + sum_of_query(tl.sum(ds, axis=1), query, QUERIES)
            tl.store(dbias_ptr + pair * num_slots + rank, dbias, mask=listed & (row % GROUP == 0))
            rank += tl.where(part == PARTS - 1, listed.to(tl.int32), 0)
        if CAP > 0:
            ds *= cap_slope(raw, CAP)
        dq += dot(ds.to(k.dtype), k, IEEE)

    target = batch * stride_db + token * stride_dt + query_head * HEAD_DIM
    store_rows(dq_ptr, target, inside, dq * scale, HEAD_DIM, WIDTH, False)


def block_sparse_attention_dq(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    shift: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_query: Tensor,
    grad_bias: Tensor | None,
    geometry: Geometry,
    block_size: int,
    scale: float,
    softcap: float | None,
    *,
    out: Tensor | None = None,
    product: Tensor | None = None,
) -> None:
    """Writes grad_query (B, T, H, D) and the listed places of grad_bias (B, T, K, S) float32. Launched over (tiles, B * K).

    With a `weight` (B, T, H), grad_out is the gradient of weight · out, and `shift` = weight · (out · grad_out). With `out`, which is
    contiguous within a token, it writes `product` = out · grad_out (B, T, H) and `shift` itself.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    group = heads // num_kv
    pairs = count_heads(query, num_kv, geometry)
    tile = tile_of(query, group)
    merged = merge_lists(indices, counts, geometry, tile.queries, block_size)
    grid = (triton.cdiv(num_queries, tile.queries), pairs)
    launch(
        _block_sparse_dq_kernel,
        lambda meta: grid,
        query,
        key,
        value,
        grad_out,
        merged.blocks,
        merged.members,
        merged.lengths,
        counts if bias is None else bias,
        lse,
        shift,
        grad_query,
        lse if grad_bias is None else grad_bias,
        lse if weight is None else weight,
        grad_query if out is None else out,
        shift if product is None else product,
        geometry.start,
        geometry.end,
        num_queries,
        num_kv,
        indices.shape[-1],
        geometry.before,
        scale,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        grad_out.stride()[:3],
        grad_query.stride()[:2],
        (0, 0) if out is None else out.stride()[:2],
        lse.stride(0),
        (0, 0, 0) if weight is None else weight.stride(),
        counts.stride(0),
        merged.lengths.stride(0),
        geometry.start.stride(),
        HAS_BIAS=bias is not None,
        CAP=cap_log2(softcap),
        HAS_WEIGHT=weight is not None,
        HAS_OUT=out is not None,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        QUERIES=tile.queries,
        ROWS=tile.rows,
        BLOCK_SIZE=block_size,
    )
