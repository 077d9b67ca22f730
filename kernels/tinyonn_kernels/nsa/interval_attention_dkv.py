"""Gradients of keys and values of attention to one interval of keys per query (`interval_attention_fwd`); dO is the gradient of w · out.

    p = e^(s - lse)   ds = p · (w (dO · v - product) + dlse) · cap',   product from `interval_attention_dq`
    dk[n] = scale · sum_rows ds q    dv[n] = sum_rows w p dO

Key-outer: each tile of keys iterates over the queries that can see it, split into SPLITS parts with separate sums. Without atomics, every
run gives the same bits.
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
    load_rows,
    load_weight,
    store_rows,
    unit_stride,
    width_of,
)

MAX_SPLITS = 16
ENOUGH_PROGRAMS = 1024


def configs(IEEE: bool, WIDTH: int, GROUP: int, CAP: float, COMPRESSED: bool, ARCH: int, **_: object) -> list[triton.Config]:
    if IEEE:
        return [config(8, 1, ROWS=16 if WIDTH >= 128 else 32, KEYS=32)]
    if WIDTH >= 256:
        return [config(4, 1, 255, ROWS=32, KEYS=32)]
    small = config(4, 2, 255, ROWS=32, KEYS=32)
    if not has_warpgroups(ARCH):
        return [config(4, 2, 255, ROWS=32, KEYS=64), small]
    # One warpgroup for 64 keys, or two for 128. Divisions by a group that is no power of two take registers.
    if WIDTH < 128:
        return [config(4, 2, 255, ROWS=32, KEYS=64), small]
    if GROUP & (GROUP - 1) == 0:
        # The fastest of twelve on an H200: the first for the rows of a window, the second for many rows.
        offered = [config(4, 1 if is_measured(ARCH) else 2, 255, ROWS=32, KEYS=64), config(8, 1, 255, ROWS=64, KEYS=128)]
        return [offered[COMPRESSED]] if is_measured(ARCH) else offered
    return [config(8, 2, 255, ROWS=32, KEYS=128) if ARCH < 100 else config(4, 2, 255, ROWS=32, KEYS=64), small]


@triton.jit
def _add_rows(
    dk,
    dv,
    k,
    v,
    n,
    begin,
    stop_row,
    start_ptr,
    end_ptr,
    q_ptr,
    do_ptr,
    lse_ptr,
    product_ptr,
    dlse_ptr,
    weight_ptr,
    stat,
    head,
    num_kv,
    before,
    reach,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_wt,
    stride_wh,
    stride_gt,
    MASKED: tl.constexpr,
    COMPRESSED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dk and dv with what ROWS more rows add; without MASKED, all of them see all keys."""
    row = begin + tl.arange(0, ROWS)
    valid = row < stop_row
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    if MASKED:
        place = token + before
        start, valid = bounds_of(start_ptr, end_ptr, place, valid, stride_gt)
        low, high = interval_of(start, place, valid, reach, COMPRESSED, PACKED)
    token = token.to(tl.int64)
    # Padding is not read, because 0 times its NaN would spread to the keys of the tile.
    q = load_rows(q_ptr, token * stride_qt + query_head * stride_qh, valid, 1, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr, token * stride_ot + query_head * stride_oh, valid, 1, HEAD_DIM, WIDTH)
    stat += token * (num_kv * GROUP) + query_head
    lse_log2 = tl.load(lse_ptr + stat, mask=valid, other=0.0) * 1.4426950408889634
    shift = tl.load(product_ptr + stat, mask=valid, other=0.0)
    weight = load_weight(weight_ptr, token * stride_wt + query_head * stride_wh, valid, HAS_WEIGHT, ROWS)
    shift *= weight
    if HAS_DLSE:
        shift -= tl.load(dlse_ptr + stat, mask=valid, other=0.0)
    scores = capped(dot(k, tl.trans(q), IEEE) * scale_log2, CAP)
    p = tl.exp2(scores - lse_log2[None, :])
    if MASKED:
        p = tl.where((n[:, None] >= low[None, :]) & (n[:, None] < high[None, :]), p, 0.0)
    dv += dot((p * weight[None, :]).to(do.dtype), do, IEEE)
    ds = p * (dot(v, tl.trans(do), IEEE) * weight[None, :] - shift[None, :])
    if CAP > 0:
        ds *= cap_slope(scores, CAP)
    return dk + dot(ds.to(q.dtype), q, IEEE), dv


@tuned(configs, key=["GROUP", "HEAD_DIM", "COMPRESSED"])
@triton.jit
def _interval_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    product_ptr,
    dlse_ptr,
    weight_ptr,
    start_ptr,
    end_ptr,
    num_rows,
    num_keys,
    num_kv,
    before,
    reach,
    scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    stride_sb,
    weight_strides,
    bounds_strides,
    COMPRESSED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # One program owns KEYS keys of one head, and one part of the rows that can see them.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_vb, stride_vt, stride_vh = v_strides
    stride_ob, stride_ot, stride_oh = do_strides
    stride_split, stride_db = dk_strides
    stride_wb, stride_wt, stride_wh = weight_strides
    stride_gb, stride_gt = bounds_strides
    batch = (tl.program_id(2) // num_kv).to(tl.int64)
    head = tl.program_id(2) % num_kv
    n0 = tl.program_id(0) * KEYS
    n = n0 + tl.arange(0, KEYS)
    start_ptr += batch * stride_gb
    end_ptr += batch * stride_gb
    n_last = tl.minimum(n0 + KEYS, num_keys) - 1
    if COMPRESSED:
        # Row r of a packed batch, if used, belongs to the sequence at position (r + 1) * reach - 1.
        first = (n0 + 1) * reach - 1
        if not PACKED:
            first += tl.load(start_ptr)
        stop = tl.load(end_ptr + ((n_last + 1) * reach - 1).to(tl.int64) * stride_gt)
    else:
        first = n0
        stop = tl.minimum(n_last + reach, tl.load(end_ptr + n_last.to(tl.int64) * stride_gt))
    first_row = tl.maximum(first - before, 0) * GROUP
    stop_row = tl.minimum((stop - before) * GROUP, num_rows)
    part = tl.cdiv(tl.cdiv(tl.maximum(stop_row - first_row, 0), tl.num_programs(1)), ROWS) * ROWS
    first_row += part * tl.program_id(1)
    stop_row = tl.minimum(first_row + part, stop_row)

    k = load_rows(k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh, n.to(tl.int64), n < num_keys, stride_kt, HEAD_DIM, WIDTH)
    v = load_rows(v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh, n.to(tl.int64), n < num_keys, stride_vt, HEAD_DIM, WIDTH)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    # Rows whose queries see all keys of the tile need no mask: `begin_whole` to `end_whole`. Packed batches have none.
    begin_whole = first_row
    end_whole = first_row
    if not PACKED:
        start = tl.load(start_ptr)
        if COMPRESSED:
            lowest = start + (n_last + 1) * reach - 1
            beyond = stop
        else:
            lowest = tl.maximum(n_last, start)
            beyond = tl.where(start <= n0, tl.minimum(n0 + reach, stop), 0)
        left = tl.cdiv(tl.maximum((lowest - before) * GROUP - first_row, 0), ROWS) * ROWS
        begin_whole = tl.minimum(first_row + left, stop_row)
        end_whole = begin_whole + tl.maximum(tl.minimum((beyond - before) * GROUP, stop_row) - begin_whole, 0) // ROWS * ROWS
    whole = end_whole - begin_whole
    q_ptr += batch * stride_qb
    do_ptr += batch * stride_ob
    weight_ptr += batch * stride_wb
    for begin in range(begin_whole, end_whole, ROWS):
        dk, dv = _add_rows(
            dk, dv, k, v, n, begin, stop_row, start_ptr, end_ptr, q_ptr, do_ptr, lse_ptr, product_ptr, dlse_ptr, weight_ptr,
            batch * stride_sb, head, num_kv, before, reach, scale_log2, stride_qt, stride_qh, stride_ot, stride_oh, stride_wt, stride_wh,
            stride_gt, False, COMPRESSED, PACKED, HAS_WEIGHT, HAS_DLSE, CAP, IEEE, GROUP, HEAD_DIM, WIDTH, ROWS,
        )  # fmt: skip
    for tile in range(first_row, stop_row - whole, ROWS):  # then the rows before and after; `tile` leaves out the whole ones
        dk, dv = _add_rows(
            dk, dv, k, v, n, tl.where(tile < begin_whole, tile, tile + whole), stop_row, start_ptr, end_ptr, q_ptr, do_ptr, lse_ptr,
            product_ptr, dlse_ptr, weight_ptr, batch * stride_sb, head, num_kv, before, reach, scale_log2, stride_qt, stride_qh, stride_ot,
            stride_oh, stride_wt, stride_wh, stride_gt, True, COMPRESSED, PACKED, HAS_WEIGHT, HAS_DLSE, CAP, IEEE, GROUP, HEAD_DIM, WIDTH,
            ROWS,
        )  # fmt: skip

    target = tl.program_id(1).to(tl.int64) * stride_split + batch * stride_db + (n.to(tl.int64) * num_kv + head) * HEAD_DIM
    store_rows(dk_ptr, target, n < num_keys, dk * scale, HEAD_DIM, WIDTH, False)
    store_rows(dv_ptr, target, n < num_keys, dv, HEAD_DIM, WIDTH, False)


def interval_attention_dkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
    product: Tensor,
    geometry: Geometry,
    reach: int,
    scale: float,
    softcap: float | None,
    *,
    compressed: bool,
) -> tuple[Tensor, Tensor]:
    """dk and dv, float32, launched over (keys / KEYS, SPLITS, B * K); `product` is the output of `interval_attention_dq`."""
    _, num_queries, heads, dim = query.shape
    num_keys, num_kv = key.shape[1:3]
    if key.numel() == 0 or query.numel() == 0:
        return torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    group = heads // num_kv
    pairs = count_heads(query, num_kv, geometry)
    programs = triton.cdiv(num_keys, 64) * pairs
    rows_of_key = num_queries * group if compressed else reach * group
    splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // programs, rows_of_key // 256))
    grads = [torch.empty((splits, *key.shape), dtype=torch.float32, device=key.device) for _ in range(2)]
    launch(
        _interval_dkv_kernel,
        lambda meta: (triton.cdiv(num_keys, meta["KEYS"]), splits, pairs),
        query,
        key,
        value,
        grad_out,
        *grads,
        lse,
        product,
        lse if grad_lse is None else grad_lse,
        lse if weight is None else weight,
        geometry.start,
        geometry.end,
        num_queries * group,
        num_keys,
        num_kv,
        geometry.before,
        reach,
        scale,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        grad_out.stride()[:3],
        grads[0].stride()[:2],
        lse.stride(0),
        (0, 0, 0) if weight is None else weight.stride(),
        geometry.start.stride(),
        COMPRESSED=compressed,
        PACKED=geometry.packed,
        HAS_WEIGHT=weight is not None,
        HAS_DLSE=grad_lse is not None,
        CAP=cap_log2(softcap),
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
    )
    if splits == 1:
        return grads[0][0], grads[1][0]
    return grads[0].sum(0), grads[1].sum(0)
