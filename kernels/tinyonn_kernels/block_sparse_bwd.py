"""Gradients of attention to listed key blocks (`block_sparse_fwd`).

    p = e^(s - lse)   ds[j] = p[j] (dO · v[j] - shift),   shift = out · dO - dlse
    dq = scale · sum_j ds[j] k[j]     dbias[slot] = sum over the block's keys and the group's heads of ds
    dk[j] = scale · sum ds[j] q       dv[j] = sum p[j] dO,   over the rows that list the block

dq and dbias are query-outer. dk and dv are key-block-outer, over the inverse of the lists: the (query, slot) entries of each
(head, key block), by a stable sort of the blocks' numbers. A block with more than SEGMENT entries (the first one, which every query
lists) is worked on by several programs with sums of their own, added up in order afterwards: no atomics, the same bits on every run,
and buffers bounded by the lists, not by the hottest block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._nsa import LOG2E, Geometry, bounds_of, dot, load_rows, unit_stride, width_of
from .block_sparse_fwd import lists, rows_of
from .interval_attention_fwd import SHAPES, example

MANY_SEGMENTS = 1024  # programs enough to fill a GPU; more would only need more buffers
MIN_SEGMENT = 256


@triton.jit
def _block_sparse_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    lse_ptr,
    shift_ptr,
    dq_ptr,
    dbias_ptr,
    weight_ptr,
    start_ptr,
    end_ptr,
    num_kv,
    num_slots,
    before,
    scale,
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
    stride_oh,
    stride_db,
    stride_dt,
    stride_sb,
    stride_wb,
    stride_wt,
    stride_wh,
    stride_cb,
    stride_gb,
    stride_gt,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
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
    pair = batch * stride_cb + token * num_kv + head
    count = tl.where(valid, tl.load(counts_ptr + pair), 0)

    rows = query_head.to(tl.int64)
    q = load_rows(q_ptr + batch * stride_qb + token * stride_qt, rows, inside, stride_qh, HEAD_DIM, WIDTH)
    do = load_rows(do_ptr + batch * stride_ob + token * stride_ot, rows, inside, stride_oh, HEAD_DIM, WIDTH)
    stat = batch * stride_sb + token * (num_kv * GROUP) + query_head
    lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=float("inf")) * 1.4426950408889634
    shift = tl.load(shift_ptr + stat, mask=inside, other=0.0)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + batch * stride_wb + token * stride_wt + query_head * stride_wh, mask=inside, other=0.0).to(tl.float32)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    PARTS: tl.constexpr = BLOCK_SIZE // KEYS
    dbias = 0.0
    for step in range(0, count * PARTS):
        slot = pair * num_slots + step // PARTS
        first = start + tl.load(indices_ptr + slot) * BLOCK_SIZE + step % PARTS * KEYS
        n = first + tl.arange(0, KEYS)
        visible = n <= place
        k = load_rows(k_ptr, n.to(tl.int64), visible, stride_kt, HEAD_DIM, WIDTH)
        v = load_rows(v_ptr, n.to(tl.int64), visible, stride_vt, HEAD_DIM, WIDTH)
        scores = dot(q, tl.trans(k), IEEE) * scale_log2
        if HAS_BIAS:
            scores += tl.load(bias_ptr + slot).to(tl.float32) * 1.4426950408889634
        p = tl.where(visible[None, :] & inside[:, None], tl.exp2(scores - lse_log2[:, None]), 0.0)
        ds = p * (weight[:, None] * dot(do, tl.trans(v), IEEE) - shift[:, None])
        if HAS_BIAS:
            dbias = tl.where(step % PARTS == 0, 0.0, dbias) + tl.sum(ds)
            tl.store(dbias_ptr + slot, dbias)
        dq += dot(ds.to(k.dtype), k, IEEE)

    feature = tl.arange(0, WIDTH)
    target = dq_ptr + batch * stride_db + token * stride_dt + (query_head * HEAD_DIM)[:, None] + feature[None, :]
    mask = inside[:, None] & (feature < HEAD_DIM)[None, :]
    dq *= scale
    if ACCUMULATE:
        dq += tl.load(target, mask=mask, other=0.0)
    tl.store(target, dq, mask=mask)


@triton.jit
def _block_sparse_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    indices_ptr,
    bias_ptr,
    lse_ptr,
    shift_ptr,
    weight_ptr,
    entries_ptr,
    tokens_ptr,
    block_of_ptr,
    offsets_ptr,
    segments_ptr,
    parts_ptr,
    partial_ptr,
    dk_ptr,
    dv_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_keys,
    num_kv,
    num_slots,
    num_blocks,
    before,
    segment,
    scale,
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
    stride_oh,
    stride_wb,
    stride_wt,
    stride_wh,
    stride_gb,
    stride_gt,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IEEE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns KEYS keys of one (head, key block), and one segment of the entries that list it.
    number = tl.load(block_of_ptr + tl.program_id(0))
    if number < num_blocks:
        which = tl.program_id(0) - tl.load(segments_ptr + number)
        alone = tl.load(segments_ptr + number + 1) - tl.load(segments_ptr + number) == 1
        stop = tl.load(offsets_ptr + number + 1)
        begin = tl.load(offsets_ptr + number) + which * segment
        stop = tl.minimum(begin + segment, stop)

        # Any entry says where its block lies.
        any_entry = tl.load(entries_ptr + begin)
        head = (any_entry // num_slots) % num_kv
        batch = any_entry // num_slots // num_kv // num_queries
        any_place = tl.load(tokens_ptr + begin).to(tl.int64) + before
        start = tl.load(start_ptr + batch * stride_gb + any_place * stride_gt)
        end = tl.load(end_ptr + batch * stride_gb + any_place * stride_gt)
        within = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        n = start + tl.load(indices_ptr + any_entry) * BLOCK_SIZE + within
        k = load_rows(k_ptr + batch * stride_kb + head * stride_kh, n.to(tl.int64), n < end, stride_kt, HEAD_DIM, WIDTH)
        v = load_rows(v_ptr + batch * stride_vb + head * stride_vh, n.to(tl.int64), n < end, stride_vt, HEAD_DIM, WIDTH)
        q_ptr += batch * stride_qb
        do_ptr += batch * stride_ob
        dk = tl.zeros((KEYS, WIDTH), tl.float32)
        dv = tl.zeros((KEYS, WIDTH), tl.float32)
        for first in range(0, (stop - begin) * GROUP, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = row < (stop - begin) * GROUP
            token = tl.load(tokens_ptr + begin + row // GROUP, mask=inside, other=0).to(tl.int64)
            query_head = head * GROUP + row % GROUP
            q = load_rows(q_ptr, token * stride_qt + query_head * stride_qh, inside, 1, HEAD_DIM, WIDTH)
            do = load_rows(do_ptr, token * stride_ot + query_head * stride_oh, inside, 1, HEAD_DIM, WIDTH)
            stat = (batch * num_queries + token) * (num_kv * GROUP) + query_head
            lse_log2 = tl.load(lse_ptr + stat, mask=inside, other=0.0) * 1.4426950408889634
            shift = tl.load(shift_ptr + stat, mask=inside, other=0.0)
            weight = tl.full((ROWS,), 1.0, tl.float32)
            if HAS_WEIGHT:
                at = batch * stride_wb + token * stride_wt + query_head * stride_wh
                weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            scores = dot(k, tl.trans(q), IEEE) * scale_log2
            if HAS_BIAS:
                entry = tl.load(entries_ptr + begin + row // GROUP, mask=inside, other=0)
                scores += (tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634)[None, :]
            visible = inside[None, :] & (n[:, None] <= (token + before)[None, :]) & (n < end)[:, None]
            p = tl.where(visible, tl.exp2(scores - lse_log2[None, :]), 0.0)
            dv += dot((p * weight[None, :]).to(do.dtype), do, IEEE)
            ds = p * (dot(v, tl.trans(do), IEEE) * weight[None, :] - shift[None, :])
            dk += dot(ds.to(q.dtype), q, IEEE)

        feature = tl.arange(0, WIDTH)
        here = (feature < HEAD_DIM)[None, :]
        dk *= scale
        if alone:
            # Nobody else touches these rows: what is there can be read and added to.
            target = (((batch * num_keys + n) * num_kv + head) * HEAD_DIM)[:, None] + feature[None, :]
            mask = (n < end)[:, None] & here
            tl.store(dk_ptr + target, dk + tl.load(dk_ptr + target, mask=mask, other=0.0), mask=mask)
            tl.store(dv_ptr + target, dv + tl.load(dv_ptr + target, mask=mask, other=0.0), mask=mask)
        else:
            part = (tl.load(parts_ptr + number) + which).to(tl.int64)
            target = ((part * 2 * BLOCK_SIZE + within) * HEAD_DIM)[:, None] + feature[None, :]
            tl.store(partial_ptr + target, dk, mask=(n < end)[:, None] & here)
            tl.store(partial_ptr + BLOCK_SIZE * HEAD_DIM + target, dv, mask=(n < end)[:, None] & here)


@triton.jit
def _block_sparse_reduce_kernel(
    indices_ptr,
    entries_ptr,
    offsets_ptr,
    segments_ptr,
    parts_ptr,
    partial_ptr,
    dk_ptr,
    dv_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_keys,
    num_kv,
    num_slots,
    before,
    stride_gb,
    stride_gt,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns KEYS keys of one (head, key block): adds the sums of its segments, first to last.
    number = tl.program_id(0)
    segments = tl.load(segments_ptr + number + 1) - tl.load(segments_ptr + number)
    if segments > 1:
        entry = tl.load(entries_ptr + tl.load(offsets_ptr + number)).to(tl.int64)
        head = (entry // num_slots) % num_kv
        batch = entry // num_slots // num_kv // num_queries
        place = (entry // num_slots // num_kv) % num_queries + before
        start = tl.load(start_ptr + batch * stride_gb + place * stride_gt)
        end = tl.load(end_ptr + batch * stride_gb + place * stride_gt)
        within = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        n = start + tl.load(indices_ptr + entry) * BLOCK_SIZE + within
        feature = tl.arange(0, WIDTH)
        mask = (n < end)[:, None] & (feature < HEAD_DIM)[None, :]
        target = (((batch * num_keys + n) * num_kv + head) * HEAD_DIM)[:, None] + feature[None, :]
        dk = tl.load(dk_ptr + target, mask=mask, other=0.0)
        dv = tl.load(dv_ptr + target, mask=mask, other=0.0)
        part = tl.load(parts_ptr + number).to(tl.int64)
        for which in range(0, segments):
            source = partial_ptr + (((part + which) * 2 * BLOCK_SIZE + within) * HEAD_DIM)[:, None] + feature[None, :]
            dk += tl.load(source, mask=mask, other=0.0)
            dv += tl.load(source + BLOCK_SIZE * HEAD_DIM, mask=mask, other=0.0)
        tl.store(dk_ptr + target, dk, mask=mask)
        tl.store(dv_ptr + target, dv, mask=mask)


class Inverse(NamedTuple):
    """Who lists which block, built on the device; blocks are numbered over (batch row, head, block), NB in all.

    Attributes:
        entries: (B * T * K * S,) int64, places in the flattened lists, block by block, those that count first.
        tokens: the query of each, int32.
        offsets: (NB + 1,) int32, where a block's entries begin.
        segments: (NB + 1,) int32, where a block's segments begin among all segments.
        parts: (NB,) int32, where its partial sums begin.
        block_of: (programs,) int32, the block of a segment; NB behind the last.
        segment: entries of one.
        num_parts: bound on the number of partial sums.
    """

    entries: Tensor
    tokens: Tensor
    offsets: Tensor
    segments: Tensor
    parts: Tensor
    block_of: Tensor
    segment: int
    num_parts: int


def invert_lists(indices: Tensor, counts: Tensor, geometry: Geometry, num_keys: int, block_size: int) -> Inverse:
    """Sizes depend on shapes alone: nothing waits for the device."""
    batch, num_queries, num_kv, num_slots = indices.shape
    device = indices.device
    rows = slice(geometry.before, geometry.before + num_queries)
    start, end, sequence = geometry.start[:, rows], geometry.end[:, rows], geometry.sequence[:, rows]
    place = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    per_head = -(-num_keys // block_size)
    base = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None] * num_kv + torch.arange(
        num_kv, dtype=torch.int32, device=device
    )
    if geometry.packed:
        # Sequence i has at most len // block_size + 1 blocks, so start // block_size + i keeps their numbers apart.
        per_head = num_keys // block_size + geometry.starts.shape[1] + 1
        base = base * per_head + (start // block_size + sequence)[:, :, None]
    else:
        base = base * per_head
    total = batch * num_kv * per_head
    inside = ((start <= place) & (place < end))[:, :, None]
    slot = torch.arange(num_slots, dtype=torch.int32, device=device)
    listed = slot < torch.where(inside, counts, 0)[..., None]
    number, entries = torch.where(listed, indices + base[..., None], total).flatten().sort(stable=True)
    offsets = torch.searchsorted(number, torch.arange(total + 1, dtype=torch.int32, device=device), out_int32=True)
    segment = max(MIN_SEGMENT, triton.next_power_of_2(triton.cdiv(max(1, indices.numel()), MANY_SEGMENTS)))
    sizes = (offsets.diff() + (segment - 1)) // segment
    segments = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    shared = torch.where(sizes > 1, sizes, 0)
    parts = shared.cumsum(0, dtype=torch.int32) - shared
    programs = total + indices.numel() // segment
    block_of = torch.searchsorted(segments[1:], torch.arange(programs, dtype=torch.int32, device=device), right=True, out_int32=True)
    tokens = (entries // (num_slots * num_kv) % num_queries).int()
    num_parts = 0 if num_queries <= segment else 2 * (indices.numel() // segment)
    return Inverse(entries, tokens, offsets, segments, parts, block_of, segment, num_parts)


# Left alone, ptxas sometimes aims at fewer registers than there are, and spills to get there: `maxnreg` says how many there are.


def _dq_tiles(dtype: torch.dtype, width: int, rows: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"KEYS": 16, "num_warps": 4 if rows * width <= 2048 else 8, "num_stages": 1, "maxnreg": 255}
    return {"KEYS": 64 if width <= 64 else 32, "num_warps": 4 if rows * width <= 8192 else 8, "num_stages": 2 if width <= 128 else 1}


def _dkv_tiles(dtype: torch.dtype, width: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 32, "num_warps": 8 if width >= 128 else 4, "num_stages": 1, "maxnreg": 255}
    if width >= 256:
        return {"ROWS": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1}
    return {"ROWS": 32 if width >= 128 else 64, "KEYS": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255}


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
    *,
    accumulate: bool = False,
) -> None:
    """Writes grad_query (B, T, H, D), or adds to it, and the listed places of grad_bias (B, T, K, S) float32. Launched over (T, B * K).

    With a `weight` (B, T, H), grad_out is the gradient of weight · out, and `shift` = weight · (out · grad_out).
    """
    batch, num_queries, heads, dim = query.shape
    num_kv = key.shape[2]
    if query.numel() == 0:
        return
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    group = heads // num_kv
    tiles = _dq_tiles(query.dtype, width_of(dim), rows_of(group))
    tiles["KEYS"] = min(tiles["KEYS"], block_size)
    _block_sparse_dq_kernel[(num_queries, batch * num_kv)](
        query,
        key,
        value,
        grad_out,
        indices,
        counts,
        counts if bias is None else bias,
        lse,
        shift,
        grad_query,
        lse if grad_bias is None else grad_bias,
        lse if weight is None else weight,
        geometry.start,
        geometry.end,
        num_kv,
        indices.shape[-1],
        geometry.before,
        scale,
        scale * LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_out.stride()[:3],
        *grad_query.stride()[:2],
        lse.stride(0),
        *((0, 0, 0) if weight is None else weight.stride()),
        counts.stride(0),
        *geometry.start.stride(),
        HAS_BIAS=bias is not None,
        HAS_WEIGHT=weight is not None,
        ACCUMULATE=accumulate,
        IEEE=query.dtype == torch.float32,
        GROUP=group,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        ROWS=rows_of(group),
        BLOCK_SIZE=block_size,
        **tiles,
    )


def block_sparse_attention_dkv(
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
    grad_key: Tensor,
    grad_value: Tensor,
    geometry: Geometry,
    block_size: int,
    scale: float,
) -> None:
    """Adds to grad_key and grad_value (B, Tk, K, D) float32, contiguous. Launched over (segments, BLOCK_SIZE / KEYS)."""
    _, num_queries, heads, dim = query.shape
    num_keys, num_kv = key.shape[1:3]
    if query.numel() == 0 or indices.numel() == 0:
        return
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    inverse = invert_lists(indices, counts, geometry, num_keys, block_size)
    tiles = _dkv_tiles(query.dtype, width_of(dim))
    tiles["KEYS"] = min(tiles["KEYS"], block_size)
    num_blocks = inverse.parts.shape[0]
    partial_sums = torch.empty((inverse.num_parts, 2, block_size, dim), dtype=torch.float32, device=query.device)
    _block_sparse_dkv_kernel[(inverse.block_of.shape[0], block_size // tiles["KEYS"])](
        query,
        key,
        value,
        grad_out,
        indices,
        counts if bias is None else bias,
        lse,
        shift,
        lse if weight is None else weight,
        inverse.entries,
        inverse.tokens,
        inverse.block_of,
        inverse.offsets,
        inverse.segments,
        inverse.parts,
        partial_sums,
        grad_key,
        grad_value,
        geometry.start,
        geometry.end,
        num_queries,
        num_keys,
        num_kv,
        indices.shape[-1],
        num_blocks,
        geometry.before,
        inverse.segment,
        scale,
        scale * LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_out.stride()[:3],
        *((0, 0, 0) if weight is None else weight.stride()),
        *geometry.start.stride(),
        HAS_BIAS=bias is not None,
        HAS_WEIGHT=weight is not None,
        IEEE=query.dtype == torch.float32,
        GROUP=heads // num_kv,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        BLOCK_SIZE=block_size,
        **tiles,
    )
    if inverse.num_parts == 0:
        return
    keys = min(block_size, max(16, 4096 // width_of(dim)))
    _block_sparse_reduce_kernel[(num_blocks, block_size // keys)](
        indices,
        inverse.entries,
        inverse.offsets,
        inverse.segments,
        inverse.parts,
        partial_sums,
        grad_key,
        grad_value,
        geometry.start,
        geometry.end,
        num_queries,
        num_keys,
        num_kv,
        indices.shape[-1],
        geometry.before,
        *geometry.start.stride(),
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        KEYS=keys,
        BLOCK_SIZE=block_size,
        num_warps=4,
        maxnreg=255,
    )


def offered(arch: int) -> dict[str, Callable[[], None]]:
    """bfloat16 to D = 256, float32 to D = 128, any group."""

    def launch(dtype: torch.dtype, dim: int, heads: int, which: str) -> None:
        query, key, geometry = example(dtype, dim, heads, 1)
        lse = torch.empty(query.shape[:3], device="meta")
        indices, counts, bias = lists(query, 2, 16)
        weight = torch.empty((*query.shape[:3], 3), dtype=dtype, device="meta")[..., 1]
        inputs = (query, key, key, indices, counts, bias, lse, lse, query, weight)
        if which == "dq":
            grad_query = torch.empty(query.shape, device="meta")
            block_sparse_attention_dq(*inputs, grad_query, bias, geometry, 64, 0.1, accumulate=True)
        else:
            grad_key = torch.empty(key.shape, device="meta")
            block_sparse_attention_dkv(*inputs, grad_key, grad_key, geometry, 64, 0.1)

    return {f"{which}-{label}": partial(launch, dtype, dim, heads, which) for label, dtype, dim, heads in SHAPES for which in ("dq", "dkv")}
