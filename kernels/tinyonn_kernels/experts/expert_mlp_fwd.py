"""First product of a mixture of small experts, fused with the gather of its rows and the activation.

    pre[p] = x[token of p] W_e^T + b_e      h[p] = act(gate) · up

Pairs p sorted by expert (`expert_sort`), F features, E experts, I neurons of an expert, W = (E, 2I, F), or (E, I, F) without a gate.
One launch serves all experts; each tile of rows belongs to one expert. One program computes both gate and up of a neuron, so h is written
from registers. `pre`, 2I values per pair, is kept for backward. h, I values per pair, is needed only until the second product
(`expert_rows`); backward recomputes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ..nsa._common import dot, unit_stride
from .expert_activation import activate, check_reach, matrix_row, ragged, tile_rows, width_of
from .expert_sort import SortedPairs


def configs(IEEE: bool, ROWS: int, NEURONS: int, FEATURES: int, **_: object) -> list[triton.Config]:
    """Experts with few neurons need few columns. float32 products run in registers instead of the matrix unit."""
    if ragged(NEURONS, FEATURES):
        warps = 4 if IEEE else min(4, ROWS // 16)  # more would compute the same rows
        return [config(warps, 1 if IEEE else 2, 255, COLUMNS=width_of(NEURONS, 32), DEPTH=16)]
    if IEEE:
        return [config(4, 1, 255, COLUMNS=width_of(NEURONS, 32), DEPTH=width_of(FEATURES, 32))]
    columns = width_of(NEURONS, 64)
    offered = [config(4, 3, COLUMNS=columns, DEPTH=width_of(FEATURES, 64))]
    offered += [config(2 if columns <= 32 else 4, 4, COLUMNS=columns, DEPTH=width_of(FEATURES, 32))]
    if NEURONS > 64:
        offered += [config(8, 3, COLUMNS=128, DEPTH=width_of(FEATURES, 64))]
    return offered


@tuned(configs, key=["NEURONS", "FEATURES", "ROWS", "ACTIVATION", "GATED"])
@triton.jit
def _expert_gate_up_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    pre_ptr,
    h_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_slots,
    stride_xn,
    w_strides,
    bias_strides,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    NEURONS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # One program owns COLUMNS neurons, gate and up, of one tile of an expert's rows.
    stride_we, stride_wo, stride_wf = w_strides
    stride_be, stride_bo = bias_strides
    blocks: tl.constexpr = (NEURONS + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= 0:
        place, inside, _, token = tile_rows(slots_ptr, offsets_ptr, tile_row_ptr, tile, expert, num_slots, ROWS)
        neuron = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        real = neuron < NEURONS
        half: tl.constexpr = NEURONS if INTERLEAVED else 0
        gate_row = matrix_row(neuron, half)
        up_row = matrix_row(neuron + NEURONS, half)
        w_ptr += expert.to(tl.int64) * stride_we
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, FEATURES, DEPTH):
            feature = start + tl.arange(0, DEPTH)
            known = feature < FEATURES
            x = tl.load(x_ptr + token[:, None] * stride_xn + feature[None, :], mask=inside[:, None] & known[None, :], other=0.0)
            w_mask = known[:, None] & real[None, :]
            column = w_ptr + feature[:, None] * stride_wf
            gate += dot(x, tl.load(column + gate_row[None, :] * stride_wo, mask=w_mask, other=0.0), IEEE)
            if GATED:
                up += dot(x, tl.load(column + up_row[None, :] * stride_wo, mask=w_mask, other=0.0), IEEE)
        if HAS_BIAS:
            bias_ptr += expert.to(tl.int64) * stride_be
            gate += tl.load(bias_ptr + gate_row * stride_bo, mask=real, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptr + up_row * stride_bo, mask=real, other=0.0).to(tl.float32)[None, :]
        mask = inside[:, None] & real[None, :]
        width: tl.constexpr = 2 * NEURONS if GATED else NEURONS
        target = pre_ptr + place[:, None] * width + neuron[None, :]
        tl.store(target, gate, mask=mask)
        if GATED:
            tl.store(target + NEURONS, up, mask=mask)
        tl.store(h_ptr + place[:, None] * NEURONS + neuron[None, :], activate(gate, up, limit, ACTIVATION, GATED), mask=mask)


def expert_gate_up(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    pre: Tensor,
    h: Tensor,
    pairs: SortedPairs,
    num_slots: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float,
) -> None:
    """Writes pre (P, 2I), gate first, and h (P, I) by place of the pair; launched over tiles * (I / COLUMNS).

    `gate_up_proj` is (E, 2I, F), or (E, I, F) without a gate, with any strides. Places after the last pair are not written.
    """
    if h.numel() == 0:
        return
    check_reach("gate_up_proj", gate_up_proj)
    neurons, features = h.shape[1], hidden_states.shape[1]
    hidden_states = unit_stride(hidden_states)
    launch(
        _expert_gate_up_kernel,
        lambda meta: (pairs.tile_expert.shape[0] * triton.cdiv(neurons, meta["COLUMNS"]),),
        hidden_states,
        gate_up_proj,
        hidden_states if gate_up_bias is None else gate_up_bias,
        pre,
        h,
        pairs.slots,
        pairs.offsets,
        pairs.tile_expert,
        pairs.tile_row,
        num_slots,
        hidden_states.stride(0),
        gate_up_proj.stride(),
        (0, 0) if gate_up_bias is None else gate_up_bias.stride(),
        float(limit),
        ACTIVATION=activation,
        GATED=gated,
        INTERLEAVED=interleaved and gated,
        HAS_BIAS=gate_up_bias is not None,
        IEEE=hidden_states.dtype == torch.float32,
        NEURONS=neurons,
        FEATURES=features,
        ROWS=pairs.rows,
    )
