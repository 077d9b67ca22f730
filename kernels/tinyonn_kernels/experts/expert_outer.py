"""Gradients of experts' matrices and biases: for each expert, the sum of outer products of its pairs' rows.

    out_e = sum over pairs p of e of  left[p]^T right[token of p]
    left_sum_e = sum of left[p]        right_sum_e = sum of weight[slot of p] · right[token of p]

Pairs p sorted by expert (`expert_sort`), left (P, J), right (N, F), out (E, J, F). For weight and bias of the first product, left is the
gradient of the activation's input and right is the input; for the second product, left is the weighted h and right is the gradient of the
output. Gradients of an expert without pairs are zero.

A program sums the pairs of its expert in order. With small experts, the pairs of one that has many are cut at the multiples of PART among
all places: an earlier launch writes the sum of each part but the first, and the expert's program adds its first part to these. Without
atomics, every run of a process gives the same bits.
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

PART = 2048  # pairs; an expert with at most this many does not outlast the rest
FILLING = 256  # tiles of one matrix that occupy a GPU, so that its pairs need not be cut


def configs(IEEE: bool, INNER: int, FEATURES: int, LATER: bool, **_: object) -> list[triton.Config]:
    """Few pairs per step, because a small expert has few. Later parts are rare, so they are not worth a trial."""
    if IEEE or ragged(INNER, FEATURES):
        return [config(4, 1 if IEEE else 2, 255, LINES=width_of(INNER, 32), COLUMNS=width_of(FEATURES, 64), DEPTH=16)]
    lines = width_of(INNER, 64)
    offered = [config(4, 2, 255, LINES=lines, COLUMNS=width_of(FEATURES, 64), DEPTH=64)]
    if LATER:
        return offered
    offered += [config(4, 2, 255, LINES=lines, COLUMNS=width_of(FEATURES, 64), DEPTH=128)]
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
    part_ptr,
    part_left_ptr,
    part_right_ptr,
    index_ptr,
    slots_ptr,
    offsets_ptr,
    num_slots,
    num_experts,
    stride_rn,
    out_strides,
    PART: tl.constexpr,
    LATER: tl.constexpr,
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
    # One program owns LINES * COLUMNS of one expert's matrix, or with LATER, of one later part of it. PART is 0 if there are none.
    stride_oe, stride_oj, stride_of = out_strides
    lines: tl.constexpr = (INNER + LINES - 1) // LINES if INNER > 0 else 1  # the bias remains without neurons
    columns: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS
    owner = tl.program_id(0) // (lines * columns)
    block = tl.program_id(0) % (lines * columns)
    inner = block // columns * LINES + tl.arange(0, LINES)
    feature = block % columns * COLUMNS + tl.arange(0, COLUMNS)
    real = inner < INNER
    known = feature < FEATURES
    expert = owner
    place_of_part = (owner + 1) * PART
    if LATER:  # the expert of the part's first pair
        used = place_of_part < tl.load(offsets_ptr + num_experts)
        slot_of_part = tl.load(slots_ptr + place_of_part, mask=used, other=0)
        expert = tl.load(index_ptr + slot_of_part, mask=used, other=0).to(tl.int32)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    stop = end
    if LATER:
        hot = used & (begin < place_of_part) & (end - begin > PART)
        begin = place_of_part
        stop = tl.where(hot, tl.minimum(end, begin + PART), begin)
    elif PART > 0:
        hot = end - begin > PART
        stop = tl.where(hot, tl.minimum(end, (begin // PART + 1) * PART), end)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    left_sum = tl.zeros((LINES,), tl.float32)
    right_sum = tl.zeros((COLUMNS,), tl.float32)
    whole = real[:, None] & known[None, :]
    if PART > 0 and not LATER:  # before the products, whose loop needs the registers
        first = begin // PART
        for number in range(0, tl.where(hot, (end - 1) // PART - first, 0)):
            later = first.to(tl.int64) + number
            total += tl.load(part_ptr + (later * INNER + inner[:, None]) * FEATURES + feature[None, :], mask=whole, other=0.0)
            if LEFT_SUM:
                left_sum += tl.load(part_left_ptr + later * INNER + inner, mask=real, other=0.0)
            if RIGHT_SUM:
                right_sum += tl.load(part_right_ptr + later * FEATURES + feature, mask=known, other=0.0)
    for start in range(begin, stop, DEPTH):
        place = start + tl.arange(0, DEPTH)
        inside = place < stop
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
    if LATER:
        if hot:
            own = owner.to(tl.int64)
            tl.store(part_ptr + (own * INNER + inner[:, None]) * FEATURES + feature[None, :], total, mask=whole)
            # Programs of the same lines or columns write the same values.
            if LEFT_SUM:
                tl.store(part_left_ptr + own * INNER + inner, left_sum, mask=real)
            if RIGHT_SUM:
                tl.store(part_right_ptr + own * FEATURES + feature, right_sum, mask=known)
    else:
        wide = expert.to(tl.int64)
        row = matrix_row(inner, HALF)
        target = out_ptr + wide * stride_oe + row[:, None] * stride_oj + feature[None, :] * stride_of
        tl.store(target, total, mask=whole)
        if LEFT_SUM:  # noqa: SIM102  a constant around what is known only when it runs
            if block % columns == 0:
                tl.store(left_sum_ptr + wide * INNER + row, left_sum, mask=real)
        if RIGHT_SUM:  # noqa: SIM102
            if block // columns == 0:
                tl.store(right_sum_ptr + wide * FEATURES + feature, right_sum, mask=known)


def part_size(pairs: int, experts: int, tiles: int) -> int:
    """Pairs of a part; 0 if no expert is cut. At most E / 4 parts are not the first, and take at most half of a bfloat16 gradient's bytes.

    Args:
        tiles: of one expert's matrix.
    """
    return max(PART, triton.next_power_of_2(max(1, 4 * pairs // experts))) if tiles < FILLING else 0


def expert_outer(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    out: Tensor,
    left_sum: Tensor | None,
    right_sum: Tensor | None,
    top_k_index: Tensor,
    pairs: SortedPairs,
    interleaved: bool,
) -> None:
    """Writes `out` (E, J, F), with any strides, and the contiguous sums (E, J) and (E, F) that are not None.

    Columns i and i + J / 2 of `left` belong to rows 2i and 2i + 1 of an interleaved matrix and of `left_sum`. `weights` are (N, K) float32,
    contiguous, and `top_k_index` is (N, K). Launched over E * (J / LINES) * (F / COLUMNS), and over the later parts before.
    """
    experts, inner, features = out.shape
    check_reach("a gradient of weights", out)
    right = unit_stride(right)
    part = part_size(len(pairs.slots), experts, triton.cdiv(inner, 64) * triton.cdiv(features, 128))
    later = max(0, len(pairs.slots) - 1) // part if part else 0
    parts, left_parts, right_parts = (
        left if target is None else left.new_empty((later, *target.shape[1:]), dtype=torch.float32) for target in (out, left_sum, right_sum)
    )

    def run(owners: int, later_parts: bool) -> None:
        launch(
            _expert_outer_kernel,
            lambda meta: (owners * max(1, triton.cdiv(inner, meta["LINES"])) * triton.cdiv(features, meta["COLUMNS"]),),
            left,
            right,
            weights,
            out,
            left if left_sum is None else left_sum,
            left if right_sum is None else right_sum,
            parts,
            left_parts,
            right_parts,
            top_k_index,
            pairs.slots,
            pairs.offsets,
            weights.shape[1],
            experts,
            right.stride(0),
            out.stride(),
            PART=part if later else 0,
            LATER=later_parts,
            HALF=inner // 2 if interleaved else 0,
            LEFT_SUM=left_sum is not None,
            RIGHT_SUM=right_sum is not None,
            IEEE=left.dtype == torch.float32,
            INNER=inner,
            FEATURES=features,
        )

    if later:
        run(later, True)
    run(experts, False)
