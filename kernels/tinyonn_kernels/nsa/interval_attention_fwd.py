"""Attention of each query to one interval of keys: the sliding window and the compressed branch of DynNSA.

    s[n] = cap(scale · q · k[n]),   lse = log sum_n e^s[n],   out = sum_n e^(s[n] - lse) v[n],   entropy = lse - sum_n p[n] s[n]

over low <= n < high (`_common.interval_of`); cap(s) = softcap · tanh(s / softcap), or s. For a query without visible
keys the results are 0, -inf, 0. Online softmax in base 2, float32 accumulation. Only tiles at the edges of what rows see are masked. The
queries of a group are rows of one tile without padding, so every group size fills the matrix unit. Sinks (`ops/nsa/_sinks.py`) join lse and
the result, not the entropy. An optional weight per row multiplies the result, which can be added to `out`.
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
    has_warpgroups,
    interval_of,
    is_measured,
    join_sink,
    load_keys,
    load_rows,
    load_weight,
    store_rows,
    unit_stride,
    whole_tiles,
    width_of,
)


def configs(IEEE: bool, WIDTH: int, COMPRESSED: bool, ARCH: int, **_: object) -> list[triton.Config]:
    """Rows × keys that leave enough registers for a (ROWS, WIDTH) accumulator. Each warpgroup needs a tile of 64 rows."""
    if IEEE:
        wide = WIDTH >= 128
        return [config(8 if wide else 4, 1, 255, ROWS=32, KEYS=16 if wide else 32)]
    if WIDTH >= 256:
        if not has_warpgroups(ARCH):
            return [config(8, 1, 255, ROWS=64, KEYS=64)]
        # Two warpgroups on 64 rows would compute the first product twice. On 128, a window's sum is spilled, but not in the loop.
        return [config(8, 2, 255, ROWS=128 if is_measured(ARCH) else 64, KEYS=32)]
    if WIDTH >= 128:
        if has_warpgroups(ARCH):
            first = config(4, 3, 255, ROWS=64, KEYS=64)  # the fastest of twelve on an H200
            return [first] if is_measured(ARCH) else [first, config(8, 3, 255, ROWS=128, KEYS=64)]
        return [config(8, stages, 255, ROWS=64, KEYS=64) for stages in (2, 3)]
    return [config(8, 2, 255, ROWS=128, KEYS=64), config(4, 3, 255, ROWS=64, KEYS=64)]


@triton.jit
def _step(
    q,
    k_ptr,
    v_ptr,
    begin,
    last,
    low,
    high,
    top,
    total,
    moment,
    mixed,
    scale_log2,
    stride_kt,
    stride_vt,
    MASKED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Sums of the softmax after KEYS more keys; without MASKED, all rows see all of them."""
    n = begin + tl.arange(0, KEYS)
    k = load_keys(k_ptr, n, last, stride_kt, MASKED, HEAD_DIM, WIDTH)
    scores = dot(q, tl.trans(k), IEEE)
    unit = scale_log2
    if CAP > 0:
        scores = capped(scores * scale_log2, CAP)
        unit = 1.0
    if MASKED:
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    # A positive scale keeps the order, so that one fused operation scales a score and subtracts the maximum.
    new_top = tl.maximum(top, tl.max(scores, axis=1) * unit)
    keep = tl.exp2(top - new_top)
    distance = scores * unit - new_top[:, None]
    p = tl.exp2(distance)
    if HAS_ENTROPY:
        if MASKED:
            distance = tl.where(visible, distance, 0.0)
        moment = keep * (moment + total * (top - new_top)) + tl.sum(p * distance, axis=1)
    v = load_keys(v_ptr, n, last, stride_vt, MASKED, HEAD_DIM, WIDTH)
    return new_top, total * keep + tl.sum(p, axis=1), moment, mixed * keep[:, None] + dot(p.to(v.dtype), v, IEEE)


@tuned(configs, key=["GROUP", "HEAD_DIM", "COMPRESSED"], changed=("out_ptr",))
@triton.jit
def _interval_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    weight_ptr,
    sinks_ptr,
    start_ptr,
    end_ptr,
    num_rows,
    num_kv,
    before,
    reach,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    stride_sb,
    weight_strides,
    bounds_strides,
    COMPRESSED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    CAP: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    # One program owns ROWS (query, head) rows of one key/value head. The last queries see the most keys, so they start first.
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_vb, stride_vt, stride_vh = v_strides
    stride_ob, stride_ot = out_strides
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
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    top = tl.full((ROWS,), BOTTOM, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    first, last, begin_whole, end_whole = whole_tiles(low, high, seen, KEYS)
    for begin in range(begin_whole, end_whole, KEYS):  # what all rows see needs no mask
        top, total, moment, mixed = _step(
            q, k_ptr, v_ptr, begin, last, low, high, top, total, moment, mixed, scale_log2, stride_kt, stride_vt, False, HAS_ENTROPY, CAP,
            IEEE, HEAD_DIM, WIDTH, KEYS,
        )  # fmt: skip
    for tile in range(first, last - (end_whole - begin_whole), KEYS):  # then what is before and after; `tile` leaves out the whole ones
        begin = tl.where(tile < begin_whole, tile, tile + (end_whole - begin_whole))
        top, total, moment, mixed = _step(
            q, k_ptr, v_ptr, begin, last, low, high, top, total, moment, mixed, scale_log2, stride_kt, stride_vt, True, HAS_ENTROPY, CAP,
            IEEE, HEAD_DIM, WIDTH, KEYS,
        )  # fmt: skip

    safe = tl.where(seen, total, 1.0)
    factor = 1.0 / safe
    stat = batch * stride_sb + token * (num_kv * GROUP) + query_head
    lse = tl.where(seen, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    if HAS_SINKS:
        lse, share = join_sink(lse, sinks_ptr, query_head, inside)
        factor *= share
    tl.store(lse_ptr + stat, lse, mask=inside)
    if HAS_ENTROPY:
        entropy = (tl.log2(safe) - moment / safe) * 0.6931471805599453
        tl.store(entropy_ptr + stat, tl.where(seen, tl.maximum(entropy, 0.0), 0.0), mask=inside)
    if HAS_WEIGHT:
        factor *= load_weight(weight_ptr, batch * stride_wb + token * stride_wt + query_head * stride_wh, inside, True, ROWS)
    mixed = tl.where(seen[:, None], mixed * factor[:, None], 0.0)
    target = batch * stride_ob + token * stride_ot + query_head * HEAD_DIM
    store_rows(out_ptr, target, inside, mixed, HEAD_DIM, WIDTH, ACCUMULATE)


def interval_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    geometry: Geometry,
    reach: int,
    scale: float,
    softcap: float | None,
    *,
    compressed: bool,
    weight: Tensor | None = None,
    sinks: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Writes out (B, T, H, D), any dtype; lse and entropy (B, T, H) float32, with equal strides. Launched over (T * G / ROWS, B * K).

    `reach` is the window or the compress size, and `scale` is positive; `sinks` are (H,); `weight` (B, T, H) multiplies the result,
    `accumulate` adds it to `out`.
    """
    _, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    group = heads // num_kv
    pairs = count_heads(query, num_kv, geometry)
    launch(
        _interval_fwd_kernel,
        lambda meta: (triton.cdiv(num_queries * group, meta["ROWS"]), pairs),
        query,
        key,
        value,
        out,
        lse,
        lse if entropy is None else entropy,
        lse if weight is None else weight,
        lse if sinks is None else sinks,
        geometry.start,
        geometry.end,
        num_queries * group,
        num_kv,
        geometry.before,
        reach,
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        out.stride()[:2],
        lse.stride(0),
        (0, 0, 0) if weight is None else weight.stride(),
        geometry.start.stride(),
        COMPRESSED=compressed,
        PACKED=geometry.packed,
        HAS_ENTROPY=entropy is not None,
        HAS_WEIGHT=weight is not None,
        HAS_SINKS=sinks is not None,
        ACCUMULATE=accumulate,
        CAP=cap_log2(softcap),
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
    )
