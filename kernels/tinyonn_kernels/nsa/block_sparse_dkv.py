"""Gradients of the keys and values of attention to listed key blocks (`block_sparse_fwd`).

    p = e^(s - lse)   ds[j] = p[j] (dO · v[j] - shift),   shift = out · dO - dlse
    dk[j] = scale · sum ds[j] cap'[j] q       dv[j] = sum p[j] dO,   over the rows that list the block

Key-block-outer, over the inverse of the lists (`block_lists`). Several programs share a block with more entries than one segment, such as
the first block, which every query lists. Their partial sums are added in a fixed order, without atomics, so every run gives the same bits.
The size of the lists, not the most popular block, bounds the buffers.
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
    capped,
    count_heads,
    dot,
    has_warpgroups,
    is_measured,
    load_rows,
    load_weight,
    store_rows,
    unit_stride,
    width_of,
)
from .block_lists import invert_lists


def configs(IEEE: bool, WIDTH: int, BLOCK_SIZE: int, GROUP: int, CAP: float, ARCH: int, **_: object) -> list[triton.Config]:
    if IEEE:
        wide = WIDTH >= 128
        return [config(8 if wide else 4, 1, 255, ROWS=16, KEYS=min(16 if wide else 32, BLOCK_SIZE))]
    if WIDTH >= 256:
        return [config(4, 1, 255, ROWS=32, KEYS=min(32, BLOCK_SIZE))]
    # Four warps multiply 64 keys together; eight would do it twice. Divisions by a group that is no power of 2 take registers.
    if has_warpgroups(ARCH) and BLOCK_SIZE >= 64 and WIDTH == 128 and GROUP & (GROUP - 1) == 0:
        few, many = config(4, 2, 255, ROWS=32, KEYS=64), config(4, 1, 255, ROWS=64, KEYS=64)
        if GROUP < 16 or CAP > 0:  # there 64 rows spill more than they gain
            return [few]
        return [many] if is_measured(ARCH) else [few, many]  # 64 rows are the fastest of eleven on an H200
    few_stages = has_warpgroups(ARCH) and BLOCK_SIZE >= 64 and WIDTH < 128
    first = config(4, 1 if few_stages else 2, 255, ROWS=32 if WIDTH >= 128 else 64, KEYS=min(64, BLOCK_SIZE))
    return [first, config(4, 2, 255, ROWS=32, KEYS=min(32, BLOCK_SIZE))]


@tuned(configs, key=["GROUP", "HEAD_DIM", "BLOCK_SIZE"], changed=("dk_ptr", "dv_ptr"))
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
    inverse_scale,
    scale_log2,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    weight_strides,
    bounds_strides,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
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
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kb, stride_kt, stride_kh = k_strides
    stride_vb, stride_vt, stride_vh = v_strides
    stride_ob, stride_ot, stride_oh = do_strides
    stride_wb, stride_wt, stride_wh = weight_strides
    stride_gb, stride_gt = bounds_strides
    number = tl.load(block_of_ptr + tl.program_id(0))
    if number < num_blocks:
        which = tl.program_id(0) - tl.load(segments_ptr + number)
        alone = tl.load(segments_ptr + number + 1) - tl.load(segments_ptr + number) == 1
        stop = tl.load(offsets_ptr + number + 1)
        begin = tl.load(offsets_ptr + number) + which * segment
        stop = tl.minimum(begin + segment, stop)

        # Any entry determines the position of its block.
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
        # No other program writes the rows of a block with one segment, so its sums go on from what is there.
        target = ((batch * num_keys + n) * num_kv + head) * HEAD_DIM
        earlier = n < tl.where(alone, end, 0)
        dk = load_rows(dk_ptr, target, earlier, 1, HEAD_DIM, WIDTH) * inverse_scale
        dv = load_rows(dv_ptr, target, earlier, 1, HEAD_DIM, WIDTH)
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
            weight = load_weight(weight_ptr, batch * stride_wb + token * stride_wt + query_head * stride_wh, inside, HAS_WEIGHT, ROWS)
            raw = capped(dot(k, tl.trans(q), IEEE) * scale_log2, CAP)
            scores = raw
            if HAS_BIAS:
                entry = tl.load(entries_ptr + begin + row // GROUP, mask=inside, other=0)
                scores += (tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634)[None, :]
            visible = inside[None, :] & (n[:, None] <= (token + before)[None, :]) & (n < end)[:, None]
            p = tl.where(visible, tl.exp2(scores - lse_log2[None, :]), 0.0)
            dv += dot((p * weight[None, :]).to(do.dtype), do, IEEE)
            ds = p * (dot(v, tl.trans(do), IEEE) * weight[None, :] - shift[None, :])
            if CAP > 0:
                ds *= cap_slope(raw, CAP)
            dk += dot(ds.to(q.dtype), q, IEEE)

        # 32-bit offsets, unlike those above: the compiler would keep those in registers throughout the loop, and spill.
        if alone:
            base = ((batch * num_keys + start + tl.load(indices_ptr + any_entry) * BLOCK_SIZE) * num_kv + head) * HEAD_DIM
            dk_ptr, dv_ptr, stride = dk_ptr + base, dv_ptr + base, num_kv * HEAD_DIM
        else:
            base = (tl.load(parts_ptr + number) + which).to(tl.int64) * (2 * BLOCK_SIZE * HEAD_DIM)
            dk_ptr, dv_ptr, stride = partial_ptr + base, partial_ptr + base + BLOCK_SIZE * HEAD_DIM, tl.full((), HEAD_DIM, tl.int32)
        store_rows(dk_ptr, within * stride, n < end, dk * scale, HEAD_DIM, WIDTH, False)
        store_rows(dv_ptr, within * stride, n < end, dv, HEAD_DIM, WIDTH, False)


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
    bounds_strides,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns KEYS keys of one (head, key block) and adds the sums of its segments, from first to last.
    stride_gb, stride_gt = bounds_strides
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
    softcap: float | None,
) -> None:
    """Adds to grad_key and grad_value (B, Tk, K, D) float32, contiguous. Launched over (segments, BLOCK_SIZE / KEYS)."""
    _, num_queries, heads, dim = query.shape
    num_keys, num_kv = key.shape[1:3]
    if query.numel() == 0 or indices.numel() == 0:
        return
    query, key, value, grad_out = (unit_stride(x) for x in (query, key, value, grad_out))
    count_heads(query, num_kv, geometry)
    inverse = invert_lists(indices, counts, geometry, num_keys, block_size)
    num_blocks = inverse.parts.shape[0]
    partial_sums = torch.empty((inverse.num_parts, 2, block_size, dim), dtype=torch.float32, device=query.device)
    launch(
        _block_sparse_dkv_kernel,
        lambda meta: (inverse.block_of.shape[0], block_size // meta["KEYS"]),
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
        0.0 if scale == 0 else 1 / scale,  # at 0, all gradients of scores that the sum has so far are 0
        scale * LOG2E,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        grad_out.stride()[:3],
        (0, 0, 0) if weight is None else weight.stride(),
        geometry.start.stride(),
        HAS_BIAS=bias is not None,
        CAP=cap_log2(softcap),
        HAS_WEIGHT=weight is not None,
        IEEE=query.dtype == torch.float32,
        GROUP=heads // num_kv,
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        BLOCK_SIZE=block_size,
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
        geometry.start.stride(),
        HEAD_DIM=dim,
        WIDTH=width_of(dim),
        KEYS=keys,
        BLOCK_SIZE=block_size,
        num_warps=4,
        maxnreg=255,
    )
