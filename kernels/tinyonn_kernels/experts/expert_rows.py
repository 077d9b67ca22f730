"""Rows of pairs times their experts' matrices, summed over a token's slots: the second product, and the first product's input gradient.

    rows[slot of p] = weight[slot] · (source[p] M_e + c_e)      out[n] = sum over the slots of token n, in their order

Pairs p sorted by expert (`expert_sort`), M = (E, J, F). Rows are written to their slots, a temporary buffer of N * K * F values. The sum
then reads the rows of a token side by side and adds them in a fixed order in float32, without atomics, so every run gives the same bits.
With one slot per token no sum is needed: the row is the output, and unused slots are zeroed before.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ..nsa._common import dot
from .expert_activation import check_reach, matrix_row, ragged, tile_rows, width_of
from .expert_sort import SortedPairs, load_experts


def configs(IEEE: bool, ROWS: int, INNER: int, FEATURES: int, **_: object) -> list[triton.Config]:
    if IEEE:
        return [config(4, 1, 255, COLUMNS=width_of(FEATURES, 64), DEPTH=width_of(INNER, 16))]
    if ragged(INNER, FEATURES):
        return [config(4, 2, 255, COLUMNS=width_of(FEATURES, 64), DEPTH=16)]
    offered = [config(4, 2, COLUMNS=width_of(FEATURES, 128), DEPTH=width_of(INNER, 64))]
    offered += [config(4, 3, COLUMNS=width_of(FEATURES, 64), DEPTH=width_of(INNER, 32))]
    return offered


@tuned(configs, key=["INNER", "FEATURES", "ROWS"])
@triton.jit
def _expert_rows_kernel(
    source_ptr,
    m_ptr,
    bias_ptr,
    weights_ptr,
    rows_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_slots,
    matrix_strides,
    bias_strides,
    SOURCE: tl.constexpr,
    HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IEEE: tl.constexpr,
    INNER: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # One program owns COLUMNS features of one tile of an expert's rows.
    stride_me, stride_mj, stride_mf = matrix_strides
    stride_be, stride_bf = bias_strides
    blocks: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= 0:
        row, inside, slot, token = tile_rows(slots_ptr, offsets_ptr, tile_row_ptr, tile, expert, num_slots, ROWS)
        if SOURCE == "token":
            row = token
        elif SOURCE == "slot":
            row = slot
        feature = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        known = feature < FEATURES
        m_ptr += expert.to(tl.int64) * stride_me
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, INNER, DEPTH):
            inner = start + tl.arange(0, DEPTH)
            real = inner < INNER
            source = tl.load(source_ptr + row[:, None] * INNER + inner[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            matrix_ptr = m_ptr + matrix_row(inner, HALF)[:, None] * stride_mj + feature[None, :] * stride_mf
            total += dot(source, tl.load(matrix_ptr, mask=real[:, None] & known[None, :], other=0.0), IEEE)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + feature * stride_bf, mask=known, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            total *= tl.load(weights_ptr + slot, mask=inside, other=0.0)[:, None]
        tl.store(rows_ptr + slot[:, None] * FEATURES + feature[None, :], total, mask=inside[:, None] & known[None, :])


@triton.jit
def _combine_slots_kernel(
    rows_ptr, index_ptr, out_ptr, num_tokens, num_slots, num_experts, FEATURES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    # One program owns COLUMNS features of TOKENS tokens.
    blocks: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    feature = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    real = token < num_tokens
    known = feature < FEATURES
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for number in range(0, num_slots):
        slot = token * num_slots + number
        used = load_experts(index_ptr, slot, real, num_experts) >= 0
        mask = used[:, None] & known[None, :]
        total += tl.load(rows_ptr + slot[:, None] * FEATURES + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token[:, None] * FEATURES + feature[None, :], total, mask=real[:, None] & known[None, :])


Source = Literal["place", "token", "slot"]


def expert_rows(
    source: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    top_k_index: Tensor,
    pairs: SortedPairs,
    interleaved: bool,
) -> Tensor:
    """(N, F): rows (P, J) by place times matrices (E, J, F) with any strides, summed over the slots of `top_k_index` (N, K).

    Rows 2i and 2i + 1 of an interleaved matrix belong to columns i and i + J / 2 of `source`. `weights` are (N, K) float32, contiguous.
    Launched over tiles * (F / COLUMNS), and then, with several slots per token, over (N / TOKENS) * (F / COLUMNS).
    """
    tokens, num_slots = top_k_index.shape
    rows = source.new_empty(tokens * num_slots, matrices.shape[2])
    if num_slots == 1:
        rows.zero_()
    products_into(rows, source, "place", matrices, bias, weights, num_slots, pairs, interleaved)
    return rows if num_slots == 1 else combine_slots(rows, top_k_index, matrices.shape[0])


def products_into(
    rows: Tensor,
    source: Tensor,
    by: Source,
    matrices: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    num_slots: int,
    pairs: SortedPairs,
    interleaved: bool = False,
) -> None:
    """Writes the rows (N * K, F) of used slots: the pair's row of `source` times its expert's matrix (E, J, F), with bias and weight.

    `source` is contiguous: (P, J) by place of the pair, (N, J) by token, or (N * K, J) by slot. Launched over tiles * (F / COLUMNS).
    """
    if rows.numel() == 0:
        return
    _, inner, features = matrices.shape
    check_reach("an expert's weights", matrices)
    launch(
        _expert_rows_kernel,
        lambda meta: (pairs.tile_expert.shape[0] * triton.cdiv(features, meta["COLUMNS"]),),
        source,
        matrices,
        source if bias is None else bias,
        source if weights is None else weights,
        rows,
        pairs.slots,
        pairs.offsets,
        pairs.tile_expert,
        pairs.tile_row,
        num_slots,
        matrices.stride(),
        (0, 0) if bias is None else bias.stride(),
        SOURCE=by,
        HALF=inner // 2 if interleaved else 0,
        HAS_BIAS=bias is not None,
        HAS_WEIGHTS=weights is not None,
        IEEE=source.dtype == torch.float32,
        INNER=inner,
        FEATURES=features,
        ROWS=pairs.rows,
    )


def combine_slots(rows: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """(N, F): rows (N * K, F) by slot, summed over the used slots of `top_k_index` (N, K); over (N / TOKENS) * (F / COLUMNS)."""
    tokens, num_slots = top_k_index.shape
    features = rows.shape[1]
    out = rows.new_empty(tokens, features)
    if out.numel():
        columns = min(512, triton.next_power_of_2(features))
        wide = 2048 // columns  # a tile has 2048 values for any number of features
        _combine_slots_kernel[(triton.cdiv(tokens, wide) * triton.cdiv(features, columns),)](
            rows, top_k_index, out, tokens, num_slots, num_experts, FEATURES=features, TOKENS=wide, COLUMNS=columns, num_warps=4
        )
    return out
