"""Gradients of queries of attention to one interval of keys per query (`interval_attention_fwd`); dO is the gradient of w · out.

    p = e^(s - lse)   dp[n] = dO · v[n]   product = sum_n p[n] dp[n]
    ds = p · (w (dp - product) + dlse) · cap'    dq = scale · sum_n ds[n] k[n]

A first pass over the keys computes `product`, which equals out · dO and the gradient of w, so out is not kept. Query-outer.
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
    interval_of,
    is_measured,
    load_keys,
    load_rows,
    load_weight,
    store_sum,
    unit_stride,
    whole_tiles,
    width_of,
)


@triton.jit
def _probabilities(
    q,
    do,
    k_ptr,
    v_ptr,
    begin,
    last,
    low,
    high,
    lse_log2,
    scale_log2,
    stride_kt,
    stride_vt,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Probabilities p of KEYS keys, their gradients dp, scores in base 2, and the keys. With MASKED, p is 0 outside [low, high)."""
    n = begin + tl.arange(0, KEYS)
    k = load_keys(k_ptr, n, last, stride_kt, MASKED, HEAD_DIM, WIDTH)
    v = load_keys(v_ptr, n, last, stride_vt, MASKED, HEAD_DIM, WIDTH)
    scores = capped(dot(q, tl.trans(k), IEEE) * scale_log2, CAP)
    p = tl.exp2(scores - lse_log2[:, None])
    if MASKED:
        p = tl.where((n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]), p, 0.0)
    return p, dot(do, tl.trans(v), IEEE), scores, k


@triton.jit
def _add_dq(dq, p, dp, scores, k, weight, shift, CAP: tl.constexpr, IEEE: tl.constexpr):
    ds = p * (weight[:, None] * dp - shift[:, None])
    if CAP > 0:
        ds *= cap_slope(scores, CAP)
    return dq + dot(ds.to(k.dtype), k, IEEE)


def configs(IEEE: bool, WIDTH: int, ARCH: int, **_: object) -> list[triton.Config]:
    if IEEE:
        tile = 16 if WIDTH >= 128 else 32
        return [config(8, 1, ROWS=tile, KEYS=tile)]
    if WIDTH >= 256:
        # What is spilled is not read in the loops; tiles that spill nothing are computed twice.
        if is_measured(ARCH):
            return [config(8, 1, 255, ROWS=128, KEYS=32)]
        return [config(4, 1, 255, ROWS=64, KEYS=16) if has_warpgroups(ARCH) else config(2, 1, 255, ROWS=32, KEYS=16)]
    narrow = config(4, 2, ROWS=64, KEYS=64 if WIDTH <= 64 and has_warpgroups(ARCH) else 32)
    if has_warpgroups(ARCH):
        if WIDTH < 128:
            return [config(8, 2, 255, ROWS=128, KEYS=64), narrow]
        first = config(4, 2, 255, ROWS=64, KEYS=64)  # the fastest of twelve on an H200
        return [first] if is_measured(ARCH) else [first, narrow]
    return [narrow, config(8, 1 if WIDTH >= 128 else 2, 255, ROWS=128, KEYS=32)]


@tuned(configs, key=["GROUP", "HEAD_DIM", "COMPRESSED"], changed=("dq_ptr",))
@triton.jit
def _interval_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dq_ptr,
    added_ptr,
    lse_ptr,
    product_ptr,
    dlse_ptr,
    weight_ptr,
    start_ptr,
    end_ptr,
    num_rows,
    num_kv,
    before,
    reach,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
    added_strides,
    stride_sb,
    weight_strides,
    bounds_strides,
    COMPRESSED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # One program owns ROWS (query, head) rows of one key/value head, and reads their keys twice.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_vb, stride_vt, stride_vh = v_strides
    stride_ob, stride_ot, stride_oh = do_strides
    stride_db, stride_dt = dq_strides
    stride_ab, stride_at = added_strides
    stride_wb, stride_wt, stride_wh = weight_strides
    stride_gb, stride_gt = bounds_strides
    batch = (tl.program_id(1) // num_kv).to(tl.int64)
    head = tl.program_id(1) % num_kv
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    place = token + before
    start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, place, inside, stride_gt)
    low, high = interval_of(start, place, valid, reach, COMPRESSED, PACKED)
    seen = high > low

    token = token.to(tl.int64)
    q = load_rows(q_ptr + batch * stride_qb, token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr + batch * stride_ob, token * stride_ot + query_head * stride_oh, inside, 1, HEAD_DIM, WIDTH)
    stat = batch * stride_sb + token * (num_kv * GROUP) + query_head
    lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=0.0) * 1.4426950408889634
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    first, last, begin_whole, end_whole = whole_tiles(low, high, seen, KEYS)
    whole = end_whole - begin_whole

    # Both passes read first what all rows see, which needs no mask, then what is before and after; `tile` leaves out the whole ones.
    product = tl.zeros((ROWS,), tl.float32)
    for begin in range(begin_whole, end_whole, KEYS):
        p, dp, _, _ = _probabilities(
            q, do, k_ptr, v_ptr, begin, last, low, high, lse_log2, scale_log2, stride_kt, stride_vt, False, CAP, IEEE, HEAD_DIM, WIDTH, KEYS
        )
        product += tl.sum(p * dp, axis=1)
    for tile in range(first, last - whole, KEYS):
        begin = tl.where(tile < begin_whole, tile, tile + whole)
        p, dp, _, _ = _probabilities(
            q, do, k_ptr, v_ptr, begin, last, low, high, lse_log2, scale_log2, stride_kt, stride_vt, True, CAP, IEEE, HEAD_DIM, WIDTH, KEYS
        )
        product += tl.sum(p * dp, axis=1)
    product = tl.where(seen, product, 0.0)
    tl.store(product_ptr + stat, product, mask=inside)

    weight = load_weight(weight_ptr, batch * stride_wb + token * stride_wt + query_head * stride_wh, inside, HAS_WEIGHT, ROWS)
    shift = weight * product
    if HAS_DLSE:
        shift -= tl.load(dlse_ptr + stat, mask=inside, other=0.0)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(begin_whole, end_whole, KEYS):
        p, dp, scores, k = _probabilities(
            q, do, k_ptr, v_ptr, begin, last, low, high, lse_log2, scale_log2, stride_kt, stride_vt, False, CAP, IEEE, HEAD_DIM, WIDTH, KEYS
        )
        dq = _add_dq(dq, p, dp, scores, k, weight, shift, CAP, IEEE)
    for tile in range(first, last - whole, KEYS):
        begin = tl.where(tile < begin_whole, tile, tile + whole)
        p, dp, scores, k = _probabilities(
            q, do, k_ptr, v_ptr, begin, last, low, high, lse_log2, scale_log2, stride_kt, stride_vt, True, CAP, IEEE, HEAD_DIM, WIDTH, KEYS
        )
        dq = _add_dq(dq, p, dp, scores, k, weight, shift, CAP, IEEE)
    dq = tl.where(seen[:, None], dq, 0.0)

    target = batch * stride_db + token * stride_dt + query_head * HEAD_DIM
    added = batch * stride_ab + token * stride_at + query_head * HEAD_DIM
    store_sum(dq_ptr, target, added_ptr, added, inside, dq * scale, HEAD_DIM, WIDTH, HAS_ADDED)


def interval_attention_dq(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
    product: Tensor,
    grad_query: Tensor,
    geometry: Geometry,
    reach: int,
    scale: float,
    softcap: float | None,
    *,
    compressed: bool,
    added: Tensor | None = None,
) -> None:
    """Writes `product` (B, T, H) and grad_query (B, T, H, D), any dtype. Launched over (T * G / ROWS, B * K).

    `added`, of the same shape, is part of grad_query; both may be the same tensor.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    group = heads // num_kv
    pairs = count_heads(query, num_kv, geometry)
    launch(
        _interval_dq_kernel,
        lambda meta: (triton.cdiv(num_queries * group, meta["ROWS"]), pairs),
        query,
        key,
        value,
        grad_out,
        grad_query,
        grad_query if added is None else added,
        lse,
        product,
        lse if grad_lse is None else grad_lse,
        lse if weight is None else weight,
        geometry.start,
        geometry.end,
        num_queries * group,
        num_kv,
        geometry.before,
        reach,
        scale,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        grad_out.stride()[:3],
        grad_query.stride()[:2],
        (0, 0) if added is None else added.stride()[:2],
        lse.stride(0),
        (0, 0, 0) if weight is None else weight.stride(),
        geometry.start.stride(),
        COMPRESSED=compressed,
        PACKED=geometry.packed,
        HAS_WEIGHT=weight is not None,
        HAS_DLSE=grad_lse is not None,
        HAS_ADDED=added is not None,
        CAP=cap_log2(softcap),
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
    )
