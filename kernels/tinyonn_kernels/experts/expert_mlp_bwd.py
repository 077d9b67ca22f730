"""Backward of a mixture of small experts for each pair: from the gradient of the output to the inputs of the weight gradients.

    grad_h = grad_out[token of p] V_e            grad_pre = w · act'(pre, grad_h)        grad of w = grad_h · h + grad_out · c_e
    surprise = |w| ‖grad_out‖ ‖h‖                                                                                       "down_proj"
               |w| sqrt(‖grad_pre / w‖² (‖x‖² + 1 with b) + ‖grad_out‖² (‖h‖² + 1 with c))                              "expert"
               |w| ‖grad_out‖                                                                                           "output"

Pairs p sorted by expert (`expert_sort`), F features, I neurons of an expert, V = (E, F, I); h is recomputed from `pre`. One program reads
all neurons of its rows, so the gradient of w and both norms are sums over its own registers. In the surprise, w is the sum of the weights
of all slots in which the token selects the expert. Norms are correct wherever they are normal float32 (`block_norms`). A surprise beyond
float32 becomes the largest finite value, because infinity marks a token that was not routed to the expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import config, launch, tuned
from ..nsa._common import dot, unit_stride
from ..statistics.block_norms import add_squares, block_norms_fwd, root
from .expert_activation import activate, activate_backward, check_reach, ragged, tile_rows, width_of
from .expert_sort import SortedPairs, load_experts

SLOTS = tl.constexpr(8)  # of a token, read at once


def configs(IEEE: bool, ROWS: int, NEURONS: int, FEATURES: int, KIND: str, **_: object) -> list[triton.Config]:
    """Six tiles of ROWS * COLUMNS are in registers: the products and what follows from them. Each takes 16 values per thread."""
    warps = 8 if ROWS == 64 else 4
    columns = width_of(NEURONS, 512 * warps // ROWS)
    if IEEE:
        return [config(4, 1, 255, COLUMNS=min(columns, 32), DEPTH=16)]
    if ragged(NEURONS, FEATURES):
        return [config(min(warps, ROWS // 8), 2, 255, COLUMNS=min(columns, 32), DEPTH=16)]
    depth = width_of(FEATURES, 64)
    if warps == 8 and KIND != "expert":  # 128 registers, where they suffice, leave room for two programs of a multiprocessor
        return [config(8, 3, 128, COLUMNS=columns, DEPTH=depth), config(4, 4, 255, COLUMNS=columns, DEPTH=depth)]
    return [config(warps, 3, 255, COLUMNS=columns, DEPTH=depth), config(4, 4, 255, COLUMNS=min(columns, 32), DEPTH=width_of(FEATURES, 32))]


@triton.jit
def _slots_of(weights_ptr, index_ptr, token, inside, first, num_slots, num_experts):
    """(ROWS, SLOTS) experts and weights of each token's slots from `first` on; -1 and 0 beyond the last."""
    number = first + tl.arange(0, SLOTS)[None, :]
    slot = token[:, None] * num_slots + number
    known = inside[:, None] & (number < num_slots)
    return load_experts(index_ptr, slot, known, num_experts), tl.load(weights_ptr + slot, mask=known, other=0.0)


@tuned(configs, key=["NEURONS", "FEATURES", "ROWS", "ACTIVATION", "GATED", "KIND"])
@triton.jit
def _expert_grad_pre_kernel(
    grad_ptr,
    down_ptr,
    down_bias_ptr,
    pre_ptr,
    weights_ptr,
    index_ptr,
    grad_norm_ptr,
    x_norm_ptr,
    grad_pre_ptr,
    weighed_h_ptr,
    grad_weights_ptr,
    surprise_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_slots,
    num_experts,
    stride_gn,
    down_strides,
    bias_strides,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    NEURONS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # One program owns one tile of an expert's rows, and all of its neurons.
    stride_de, stride_df, stride_di = down_strides
    stride_be, stride_bf = bias_strides
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= 0:
        place, inside, slot, token = tile_rows(slots_ptr, offsets_ptr, tile_row_ptr, tile, expert, num_slots, ROWS)
        weight = tl.load(weights_ptr + slot, mask=inside, other=0.0)
        down_ptr += expert.to(tl.int64) * stride_de
        width: tl.constexpr = 2 * NEURONS if GATED else NEURONS
        if KIND != "none":  # loaded before the products, which hide how long it takes
            experts, weights = _slots_of(weights_ptr, index_ptr, token, inside, 0, num_slots, num_experts)
            grad_norm = tl.load(grad_norm_ptr + token, mask=inside, other=0.0)
        grad_weight = tl.zeros((ROWS,), tl.float32)
        h_large = tl.zeros((ROWS, 1), tl.float32)
        h_medium, h_small, pre_large, pre_medium, pre_small = h_large, h_large, h_large, h_large, h_large
        for first in range(0, NEURONS, COLUMNS):
            neuron = first + tl.arange(0, COLUMNS)
            real = neuron < NEURONS
            grad_h = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, FEATURES, DEPTH):
                feature = start + tl.arange(0, DEPTH)
                known = feature < FEATURES
                grad = tl.load(grad_ptr + token[:, None] * stride_gn + feature[None, :], mask=inside[:, None] & known[None, :], other=0.0)
                matrix_ptr = down_ptr + feature[:, None] * stride_df + neuron[None, :] * stride_di
                grad_h += dot(grad, tl.load(matrix_ptr, mask=known[:, None] & real[None, :], other=0.0), IEEE)
            mask = inside[:, None] & real[None, :]
            source = place[:, None] * width + neuron[None, :]
            gate = tl.load(pre_ptr + source, mask=mask, other=0.0).to(tl.float32)
            up = gate
            if GATED:
                up = tl.load(pre_ptr + source + NEURONS, mask=mask, other=0.0).to(tl.float32)
            h = tl.where(mask, activate(gate, up, limit, ACTIVATION, GATED), 0.0)
            grad_gate, grad_up = activate_backward(gate, up, grad_h, limit, ACTIVATION, GATED)
            grad_weight += tl.sum(grad_h * h, axis=1)
            if KIND == "down_proj" or KIND == "expert":
                h_large, h_medium, h_small = add_squares(h[:, None, :], h_large, h_medium, h_small)
            if KIND == "expert":
                known_gate = tl.where(mask, grad_gate, 0.0)[:, None, :]
                pre_large, pre_medium, pre_small = add_squares(known_gate, pre_large, pre_medium, pre_small)
                if GATED:
                    known_up = tl.where(mask, grad_up, 0.0)[:, None, :]
                    pre_large, pre_medium, pre_small = add_squares(known_up, pre_large, pre_medium, pre_small)
            tl.store(weighed_h_ptr + place[:, None] * NEURONS + neuron[None, :], h * weight[:, None], mask=mask)
            tl.store(grad_pre_ptr + source, grad_gate * weight[:, None], mask=mask)
            if GATED:
                tl.store(grad_pre_ptr + source + NEURONS, grad_up * weight[:, None], mask=mask)

        if HAS_DOWN_BIAS:
            down_bias_ptr += expert.to(tl.int64) * stride_be
            for start in range(0, FEATURES, DEPTH):
                feature = start + tl.arange(0, DEPTH)
                known = feature < FEATURES
                grad = tl.load(grad_ptr + token[:, None] * stride_gn + feature[None, :], mask=inside[:, None] & known[None, :], other=0.0)
                bias = tl.load(down_bias_ptr + feature * stride_bf, mask=known, other=0.0).to(tl.float32)
                grad_weight += tl.sum(grad.to(tl.float32) * bias[None, :], axis=1)
        tl.store(grad_weights_ptr + slot, grad_weight, mask=inside)

        if KIND != "none":
            # A few products per row are in float64, because intermediate values can leave float32's range.
            found = grad_norm.to(tl.float64)
            if KIND == "down_proj" or KIND == "expert":
                h_norm = tl.reshape(root(h_large, h_medium, h_small), (ROWS,)).to(tl.float64)
            if KIND == "down_proj":
                found *= h_norm
            elif KIND == "expert":
                pre_norm = tl.reshape(root(pre_large, pre_medium, pre_small), (ROWS,)).to(tl.float64)
                x_norm = tl.load(x_norm_ptr + token, mask=inside, other=0.0).to(tl.float64)
                of_up = pre_norm * pre_norm * (x_norm * x_norm + (1.0 if HAS_UP_BIAS else 0.0))
                found = tl.sqrt(of_up + found * found * (h_norm * h_norm + (1.0 if HAS_DOWN_BIAS else 0.0)))
            size = tl.sum(tl.where(experts == expert, weights, 0.0), axis=1)  # of all slots in which the token selects the expert
            for first in range(SLOTS, num_slots, SLOTS):
                experts, weights = _slots_of(weights_ptr, index_ptr, token, inside, first, num_slots, num_experts)
                size += tl.sum(tl.where(experts == expert, weights, 0.0), axis=1)
            found *= tl.abs(size).to(tl.float64)
            found = tl.where(found > 3.4028234663852886e38, 3.4028234663852886e38, found)  # this comparison preserves NaN
            tl.store(surprise_ptr + slot, found.to(tl.float32), mask=inside)


def expert_grad_pre(
    hidden_states: Tensor,
    grad_out: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    weights: Tensor,
    top_k_index: Tensor,
    pairs: SortedPairs,
    activation: str,
    gated: bool,
    kind: str | None,
    has_up_bias: bool,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """grad_pre (P, 2I) and weight · h (P, I) by place of the pair; grad of weights and, with `kind`, the surprise, (N, K) float32.

    `down_proj` is (E, F, I) with any strides; `weights` (N, K) float32 and `top_k_index` are contiguous. Values of unused slots are 0.
    Places after the last pair are not written. Launched over tiles.
    """
    experts, features, neurons = down_proj.shape
    check_reach("down_proj", down_proj)
    grad_out = unit_stride(grad_out)
    grad_pre, weighed_h = torch.empty_like(pre), pre.new_empty(len(pre), neurons)
    grad_weights = torch.zeros_like(weights)
    surprise = None if kind is None else torch.zeros_like(weights)
    # All pairs of a token share its norms.
    grad_norm = None if kind is None else _row_norms(grad_out)
    x_norm = _row_norms(hidden_states) if kind == "expert" else None
    launch(
        _expert_grad_pre_kernel,
        lambda meta: (pairs.tile_expert.shape[0],),
        grad_out,
        down_proj,
        grad_out if down_bias is None else down_bias,
        pre,
        weights,
        top_k_index,
        weights if grad_norm is None else grad_norm,
        weights if x_norm is None else x_norm,
        grad_pre,
        weighed_h,
        grad_weights,
        grad_weights if surprise is None else surprise,
        pairs.slots,
        pairs.offsets,
        pairs.tile_expert,
        pairs.tile_row,
        top_k_index.shape[1],
        experts,
        grad_out.stride(0),
        down_proj.stride(),
        (0, 0) if down_bias is None else down_bias.stride(),
        float(limit),
        ACTIVATION=activation,
        GATED=gated,
        KIND=kind or "none",
        HAS_UP_BIAS=has_up_bias,
        HAS_DOWN_BIAS=down_bias is not None,
        IEEE=pre.dtype == torch.float32,
        NEURONS=neurons,
        FEATURES=features,
        ROWS=pairs.rows,
    )
    return grad_pre, weighed_h, grad_weights, surprise


def _row_norms(rows: Tensor) -> Tensor:
    """(N, F) -> (N,) float32 norms, without overflow or underflow."""
    norms = torch.empty((rows.shape[0], 1), dtype=torch.float32, device=rows.device)
    block_norms_fwd(rows, None, norms, rows.shape[1])
    return norms.squeeze(1)
