"""Entropy of each query's attention and its mass on a span of keys, without values and without storing the matrix.

    s[j] = cap(scale · q · k[j]) + bias[j],   p[j] = e^(s[j] - lse),   entropy = -Σ_j p[j] ln p[j],   mass = Σ_{j in span} p[j]

cap(x) = softcap · tanh(x / softcap). A sink is an additional score that enters only lse. For a query without visible keys both results are
0. Online softmax in base 2, float32 accumulation; a running sum of p · (s - top) avoids cancellation of large values. The queries of a
group are rows of one tile: row = query * GROUP + head. Tiles of keys outside [place - window, place] are skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ..nsa._common import BOTTOM, LOG2E, MAX_GRID, MAX_ROWS, dot, load_rows, softmax_step, tanh, unit_stride, width_of

HIDDEN = tl.constexpr(-1.4e30)  # -1e30 in base 2; scores up to this value count as masked
LN2 = tl.constexpr(0.6931471805599453)


def configs(IEEE: bool, WIDTH: int, HAS_BIAS: bool, **_: object) -> list[triton.Config]:
    """Rows × keys that fit in registers; a bias needs another tile, of 64-bit addresses."""
    if IEEE:
        return [config(8 if WIDTH >= 128 else 4, 1, 255, ROWS=32, KEYS=16 if WIDTH >= 128 else 32)]
    if WIDTH >= 256 or (HAS_BIAS and WIDTH >= 128):
        return [config(8, 2, 255, ROWS=64, KEYS=32)]
    return [config(8, 3, 255, ROWS=128, KEYS=64), config(4, 3, 255, ROWS=64, KEYS=64)]


@tuned(configs, key=["GROUP", "HEAD_DIM", "CAUSAL", "HAS_BIAS"])
@triton.jit
def _attention_stats_kernel(
    q_ptr,
    k_ptr,
    entropy_ptr,
    mass_ptr,
    span_ptr,
    key_mask_ptr,
    sink_ptr,
    bias_ptr,
    num_rows,
    num_keys,
    num_kv,
    before,
    window,
    scale_log2,
    softcap_log2,
    q_strides,
    k_strides,
    stride_eb,
    span_strides,
    key_mask_strides,
    bias_strides,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOOL_BIAS: tl.constexpr,
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
    stride_sb, stride_st = span_strides
    stride_mb, stride_mt = key_mask_strides
    stride_bb, stride_bh, stride_bt, stride_bs = bias_strides
    batch = (tl.program_id(1) // num_kv).to(tl.int64)
    head = tl.program_id(1) % num_kv
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    place = token + before
    first, last = 0, num_keys
    if WINDOW:
        first = tl.maximum(0, (tile * ROWS) // GROUP + before - window + 1)
    if CAUSAL:
        last = tl.minimum(num_keys, (tl.minimum(tile * ROWS + ROWS, num_rows) - 1) // GROUP + before + 1)

    token = token.to(tl.int64)
    q = load_rows(q_ptr + batch * stride_qb, token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    top = tl.full((ROWS,), BOTTOM, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for begin in range(first, last, KEYS):
        n = begin + tl.arange(0, KEYS)
        far = n.to(tl.int64)
        there = n < num_keys
        k = load_rows(k_ptr, far, there, stride_kt, HEAD_DIM, WIDTH)
        scores = dot(q, tl.trans(k), IEEE) * scale_log2
        if SOFTCAP:
            scores = softcap_log2 * tanh(scores / softcap_log2)
        visible = inside[:, None] & there[None, :]
        if CAUSAL:
            visible &= n[None, :] <= place[:, None]
        if WINDOW:
            visible &= n[None, :] > (place - window)[:, None]
        if HAS_KEY_MASK:
            visible &= tl.load(key_mask_ptr + batch * stride_mb + far * stride_mt, mask=there, other=0)[None, :] != 0
        if HAS_BIAS:
            offset = batch * stride_bb + query_head.to(tl.int64) * stride_bh + token * stride_bt
            bias = tl.load(bias_ptr + offset[:, None] + (far * stride_bs)[None, :], mask=visible, other=0)
            if BOOL_BIAS:
                visible &= bias != 0
            else:
                scores += bias.to(tl.float32) * 1.4426950408889634
                visible &= scores > HIDDEN
        scores = tl.where(visible, scores, float("-inf"))
        p, new_top, new_total, keep = softmax_step(scores, top, total)
        moment = keep * (moment + total * (top - new_top)) + tl.sum(p * tl.where(visible, scores - new_top[:, None], 0.0), axis=1)
        if HAS_SPAN:
            span = tl.load(span_ptr + batch * stride_sb + far * stride_st, mask=there, other=0) != 0
            mass = keep * mass + tl.sum(tl.where(span[None, :], p, 0.0), axis=1)
        top, total = new_top, new_total

    seen = total > 0.0
    whole = total
    if HAS_SINK:
        # Otherwise, a masked maximum would receive a share like any other score.
        sink = tl.load(sink_ptr + query_head, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        keep = tl.exp2(top - new_top)
        moment = keep * (moment + total * (top - new_top))
        mass *= keep
        total *= keep
        whole = total + tl.exp2(sink - new_top)
    safe = tl.where(seen, whole, 1.0)
    entropy = (tl.log2(safe) * total - moment) / safe * LN2
    stat = batch * stride_eb + token * (num_kv * GROUP) + query_head
    # A maximum would drop NaN.
    tl.store(entropy_ptr + stat, tl.where(seen | (total != total), tl.where(entropy < 0.0, 0.0, entropy), 0.0), mask=inside)
    if HAS_SPAN:
        tl.store(mass_ptr + stat, tl.where(seen | (total != total), mass / safe, 0.0), mask=inside)


def attention_stats_fwd(
    query: Tensor,
    key: Tensor,
    entropy: Tensor,
    mass: Tensor,
    span_mask: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> None:
    """Writes entropy and, with a span, mass: (B, T, H) float32 contiguous. Launched over (T * G / ROWS, B * K).

    `bias` has four dimensions, each of full size or 1; 0 disables `window` and `softcap`.
    """
    batch, num_queries, heads, dim = query.shape
    num_keys, num_kv = key.shape[1:3]
    if query.numel() == 0:
        return
    group = heads // num_kv
    if max(num_queries * group, num_keys) >= MAX_ROWS or batch * num_kv > MAX_GRID:
        raise ValueError(
            f"query must have fewer than {MAX_ROWS} rows times heads of a group, and at most {MAX_GRID} key heads in all batch rows, "
            f"with impl='triton', got {num_queries * group} and {batch * num_kv}."
        )
    query, key = unit_stride(query), unit_stride(key)
    none = query
    strides = (0, 0, 0, 0)
    if bias is not None:
        strides = tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
    launch(
        _attention_stats_kernel,
        lambda meta: (triton.cdiv(num_queries * group, meta["ROWS"]), batch * num_kv),
        query,
        key,
        entropy,
        mass,
        none if span_mask is None else span_mask,
        none if key_mask is None else key_mask,
        none if sinks is None else sinks.contiguous(),
        none if bias is None else bias,
        num_queries * group,
        num_keys,
        num_kv,
        num_keys - num_queries,
        window,
        scale * LOG2E,
        softcap * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        entropy.stride(0),
        (0, 0) if span_mask is None else span_mask.stride(),
        (0, 0) if key_mask is None else key_mask.stride(),
        strides,
        CAUSAL=causal,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        HAS_SPAN=span_mask is not None,
        HAS_KEY_MASK=key_mask is not None,
        HAS_SINK=sinks is not None,
        HAS_BIAS=bias is not None,
        BOOL_BIAS=bias is not None and bias.dtype == torch.bool,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
    )
