"""Causal attention of each query to the key blocks of its list.

    s[j] = scale · q · k[j] + bias[slot],  j in block indices[slot], j <= place of the query
    lse = log sum_j e^s[j],   out = sum_j e^(s[j] - lse) v[j]

B batch, T queries, K key/value heads, G query heads of each, S slots of a list. Query-outer: the heads of a group share the list, so
they are the rows of one tile, padded to 16. Online softmax in base 2, float32 accumulation. Blocks longer than a tile are read in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._nsa import LOG2E, Geometry, bounds_of, dot, load_rows, unit_stride, width_of
from .interval_attention_fwd import BOTTOM, SHAPES, example


@triton.jit
def _block_sparse_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    end_ptr,
    num_kv,
    num_slots,
    before,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_sb,
    stride_cb,
    stride_gb,
    stride_gt,
    HAS_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns one query of one key/value head: GROUP rows of ROWS.
    token = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // num_kv).to(tl.int64)
    head = tl.program_id(1) % num_kv
    member = tl.arange(0, ROWS)
    inside = member < GROUP
    query_head = head * GROUP + member
    place = tl.program_id(0) + before
    start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, place, True, stride_gt)
    # counts, indices and bias are contiguous rows: (B, T, K) of `num_slots` each.
    pair = batch * stride_cb + token * num_kv + head
    count = tl.where(valid, tl.load(counts_ptr + pair), 0)

    q = load_rows(q_ptr + batch * stride_qb + token * stride_qt, query_head.to(tl.int64), inside, stride_qh, HEAD_DIM, WIDTH)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    top = tl.full((ROWS,), BOTTOM, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    for step in range(0, count * PARTS):
        slot = pair * num_slots + step // PARTS
        first = start + tl.load(indices_ptr + slot) * BLOCK_SIZE + step % PARTS * KEYS
        n = first + tl.arange(0, KEYS)
        visible = n <= place
        k = load_rows(k_ptr, n.to(tl.int64), visible, stride_kt, HEAD_DIM, WIDTH)
        scores = dot(q, tl.trans(k), IEEE) * scale_log2
        if HAS_BIAS:
            scores += tl.load(bias_ptr + slot).to(tl.float32) * 1.4426950408889634
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * keep + tl.sum(p, axis=1)
        v = load_rows(v_ptr, n.to(tl.int64), visible, stride_vt, HEAD_DIM, WIDTH)
        mixed = mixed * keep[:, None] + dot(p.to(v.dtype), v, IEEE)
        top = new_top

    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    stat = batch * stride_sb + token * (num_kv * GROUP) + query_head
    tl.store(lse_ptr + stat, tl.where(seen, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf")), mask=inside)
    feature = tl.arange(0, WIDTH)
    target = out_ptr + batch * stride_ob + token * stride_ot + (query_head * HEAD_DIM)[:, None] + feature[None, :]
    tl.store(target, mixed / safe[:, None], mask=inside[:, None] & (feature < HEAD_DIM)[None, :])


def rows_of(group: int) -> int:
    """Rows of a tile that holds the heads of a group: at least what the matrix unit takes."""
    return max(16, triton.next_power_of_2(group))


def _tiles(dtype: torch.dtype, width: int, rows: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"KEYS": 32 if rows <= 32 else 16, "num_warps": 4 if rows * width <= 2048 else 8, "num_stages": 1}
    return {"KEYS": 64 if width <= 128 else 32, "num_warps": 4 if rows * width <= 8192 else 8, "num_stages": 2}


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
) -> None:
    """Writes out (B, T, H, D) and lse (B, T, H) float32; launched over (T, B * K). Lists are contiguous but for their batch stride."""
    batch, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    group = heads // num_kv
    tiles = _tiles(query.dtype, width_of(dim), rows_of(group))
    tiles["KEYS"] = min(tiles["KEYS"], block_size)
    _block_sparse_fwd_kernel[(num_queries, batch * num_kv)](
        query,
        key,
        value,
        indices,
        counts,
        counts if bias is None else bias,
        out,
        lse,
        geometry.start,
        geometry.end,
        num_kv,
        indices.shape[-1],
        geometry.before,
        scale * LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:2],
        lse.stride(0),
        counts.stride(0),
        *geometry.start.stride(),
        HAS_BIAS=bias is not None,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        ROWS=rows_of(group),
        BLOCK_SIZE=block_size,
        **tiles,
    )


def lists(query: Tensor, num_kv: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices, counts, bias without data, for `offered`."""
    rows = (*query.shape[:2], num_kv)
    indices = torch.empty((*rows, slots), dtype=torch.int32, device="meta")
    return indices, torch.empty(rows, dtype=torch.int32, device="meta"), torch.empty((*rows, slots), device="meta")


def offered(arch: int) -> dict[str, Callable[[], None]]:
    """bfloat16 to D = 256, float32 to D = 128, any group."""

    def launch(dtype: torch.dtype, dim: int, heads: int) -> None:
        query, key, geometry = example(dtype, dim, heads, 1)
        lse = torch.empty(query.shape[:3], device="meta")
        block_sparse_attention_fwd(query, key, key, *lists(query, 2, 16), torch.empty_like(query), lse, geometry, 64, 0.1)

    return {label: partial(launch, dtype, dim, heads) for label, dtype, dim, heads in SHAPES}
