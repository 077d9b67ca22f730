"""Gradients of experts' matrices and biases: for each expert, the sum of outer products of its pairs' rows.

    out_e = sum over pairs p of e of  left[p]^T right[token of p]
    left_sum_e = sum of left[p]        right_sum_e = sum of weight[slot of p] · right[token of p]

Pairs p sorted by expert (`expert_sort`), left (P, J), right (N, F), out (E, J, F). For weight and bias of the first product, left is the
gradient of the activation's input and right is the input; for the second product, left is the weighted h and right is the gradient of the
output. Gradients of an expert without pairs are zero. A program processes all pairs of its expert in order, without atomics, so every run
of a process gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ..nsa._common import dot, unit_stride
from .expert_activation import check_reach, matrix_row, ragged, width_of
from .expert_sort import SortedPairs


def configs(IEEE: bool, INNER: int, FEATURES: int, **_: object) -> list[triton.Config]:
    """Few pairs per step, because a small expert has few."""
    if IEEE or ragged(INNER, FEATURES):
        return [config(4, 1 if IEEE else 2, 255, LINES=width_of(INNER, 32), COLUMNS=width_of(FEATURES, 64), DEPTH=16)]
    offered = [config(4, 3, 255, LINES=width_of(INNER, 64), COLUMNS=width_of(FEATURES, 128), DEPTH=32)]
    offered += [config(4, 3, 255, LINES=width_of(INNER, 64), COLUMNS=width_of(FEATURES, 64), DEPTH=16)]
    if INNER > 64:
        offered += [config(8, 3, 255, LINES=128, COLUMNS=width_of(FEATURES, 128), DEPTH=32)]
    return offered


@tuned(configs, key=["INNER", "FEATURES"])
@triton.jit
def _expert_outer_kernel(
    left_ptr,
    right_ptr,
    weights_ptr,
    out_ptr,
    left_sum_ptr,
    right_sum_ptr,
    slots_ptr,
    offsets_ptr,
    num_slots,
    stride_rn,
    out_strides,
    HALF: tl.constexpr,
    LEFT_SUM: tl.constexpr,
    RIGHT_SUM: tl.constexpr,
    IEEE: tl.constexpr,
    INNER: tl.constexpr,
    FEATURES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # One program owns LINES * COLUMNS of one expert's matrix.
    stride_oe, stride_oj, stride_of = out_strides
    lines: tl.constexpr = (INNER + LINES - 1) // LINES if INNER > 0 else 1  # the bias remains without neurons
    columns: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // (lines * columns)
    block = tl.program_id(0) % (lines * columns)
    inner = block // columns * LINES + tl.arange(0, LINES)
    feature = block % columns * COLUMNS + tl.arange(0, COLUMNS)
    real = inner < INNER
    known = feature < FEATURES
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    left_sum = tl.zeros((LINES,), tl.float32)
    right_sum = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, end, DEPTH):
        place = start + tl.arange(0, DEPTH)
        inside = place < end
        slot = tl.load(slots_ptr + place, mask=inside, other=0)
        token = (slot // num_slots).to(tl.int64)
        left_mask = real[:, None] & inside[None, :]
        left = tl.load(left_ptr + place.to(tl.int64)[None, :] * INNER + inner[:, None], mask=left_mask, other=0.0)
        right_mask = inside[:, None] & known[None, :]
        right = tl.load(right_ptr + token[:, None] * stride_rn + feature[None, :], mask=right_mask, other=0.0)
        total += dot(left, right, IEEE)
        if LEFT_SUM:
            left_sum += tl.sum(left.to(tl.float32), axis=1)
        if RIGHT_SUM:
            weight = tl.load(weights_ptr + slot, mask=inside, other=0.0)
            right_sum += tl.sum(right.to(tl.float32) * weight[:, None], axis=0)
    wide = expert.to(tl.int64)
    row = matrix_row(inner, HALF)
    target = out_ptr + wide * stride_oe + row[:, None] * stride_oj + feature[None, :] * stride_of
    tl.store(target, total, mask=real[:, None] & known[None, :])
    if LEFT_SUM:  # noqa: SIM102  a constant around what is known only when it runs
        if block % columns == 0:
            tl.store(left_sum_ptr + wide * INNER + row, left_sum, mask=real)
    if RIGHT_SUM:  # noqa: SIM102
        if block // columns == 0:
            tl.store(right_sum_ptr + wide * FEATURES + feature, right_sum, mask=known)


def expert_outer(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    out: Tensor,
    left_sum: Tensor | None,
    right_sum: Tensor | None,
    pairs: SortedPairs,
    interleaved: bool,
) -> None:
    """Writes `out` (E, J, F), with any strides, and the contiguous sums (E, J) and (E, F) that are not None.

    Columns i and i + J / 2 of `left` belong to rows 2i and 2i + 1 of an interleaved matrix and of `left_sum`. `weights` are (N, K) float32,
    contiguous. Launched over E * (J / LINES) * (F / COLUMNS).
    """
    experts, inner, features = out.shape
    check_reach("a gradient of weights", out)
    right = unit_stride(right)
    launch(
        _expert_outer_kernel,
        lambda meta: (experts * max(1, triton.cdiv(inner, meta["LINES"])) * triton.cdiv(features, meta["COLUMNS"]),),
        left,
        right,
        weights,
        out,
        left if left_sum is None else left_sum,
        left if right_sum is None else right_sum,
        pairs.slots,
        pairs.offsets,
        weights.shape[1],
        right.stride(0),
        out.stride(),
        HALF=inner // 2 if interleaved else 0,
        LEFT_SUM=left_sum is not None,
        RIGHT_SUM=right_sum is not None,
        IEEE=left.dtype == torch.float32,
        INNER=inner,
        FEATURES=features,
    )
