"""Activation between an expert's two products and its derivative, row order of its matrices, and rows of a tile.

    h = act(gate) · up, or act(gate) without gating
    clamped_swiglu, of gpt-oss: min(gate, c) · σ(1.702 min(gate, c)) · (clamp(up, ±c) + 1)
    clamped_silu, of DeepSeek-V4: silu(min(gate, c)) · clamp(up, ±c)

c is `limit`; other activations ignore it. Comparisons replace minima, which would drop NaN. Between kernels, inputs of the activation are
stored with gate first and up second, in any layout of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_REACH = 1 << 31


@triton.jit
def _act(x, limit, ACTIVATION: tl.constexpr):
    """act(x) of a float32 x."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = σ(2z)
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACTIVATION == "relu2":
        kept = tl.where(x < 0.0, 0.0, x)
        return kept * kept
    elif ACTIVATION == "clamped_silu":
        kept = tl.where(x > limit, limit, x)
        return kept * tl.sigmoid(kept)
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        kept = tl.where(x > limit, limit, x)
        return kept * tl.sigmoid(1.702 * kept)


@triton.jit
def _slope(x, limit, ACTIVATION: tl.constexpr):
    """Derivative of act at a float32 x."""
    if ACTIVATION == "silu":
        sigma = tl.sigmoid(x)
        return sigma * (1.0 + x * (1.0 - sigma))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        sigma = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return sigma + x * sigma * (1.0 - sigma) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu2":
        return 2.0 * tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "clamped_silu":
        sigma = tl.sigmoid(x)
        return tl.where(x > limit, 0.0, sigma * (1.0 + x * (1.0 - sigma)))
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        sigma = tl.sigmoid(1.702 * x)
        return tl.where(x > limit, 0.0, sigma * (1.0 + 1.702 * x * (1.0 - sigma)))


@triton.jit
def _factor(up, limit, ACTIVATION: tl.constexpr):
    """Factor of act(gate) in h."""
    if ACTIVATION == "clamped_swiglu":
        return tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    elif ACTIVATION == "clamped_silu":
        return tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    else:
        return up


@triton.jit
def activate(gate, up, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """h from float32 gate and up; without gating, `up` is ignored."""
    if GATED:
        return _act(gate, limit, ACTIVATION) * _factor(up, limit, ACTIVATION)
    else:
        return _act(gate, limit, ACTIVATION)


@triton.jit
def activate_backward(gate, up, grad, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Gradients of gate and up from the gradient of h. Without gating, both are the gradient of gate."""
    if GATED:
        grad_gate = grad * _factor(up, limit, ACTIVATION) * _slope(gate, limit, ACTIVATION)
        grad_up = grad * _act(gate, limit, ACTIVATION)
        if ACTIVATION == "clamped_swiglu" or ACTIVATION == "clamped_silu":
            grad_up = tl.where((up > limit) | (up < -limit), 0.0, grad_up)
        return grad_gate, grad_up
    else:
        grad_gate = grad * _slope(gate, limit, ACTIVATION)
        return grad_gate, grad_gate


@triton.jit
def matrix_row(place, HALF: tl.constexpr):
    """Row of the weight matrix for a place in gate-first order. HALF is the number of gates if gate and up rows alternate, otherwise 0."""
    if HALF == 0:
        return place
    else:
        return place % HALF * 2 + place // HALF


@triton.jit
def tile_rows(slots_ptr, offsets_ptr, tile_row_ptr, tile, expert, num_slots, ROWS: tl.constexpr):
    """Places of a tile, whether each belongs to the expert, and their slots and tokens: (ROWS,), int64 except for the mask."""
    place = tl.load(tile_row_ptr + tile) + tl.arange(0, ROWS)
    inside = place < tl.load(offsets_ptr + expert + 1)
    slot = tl.load(slots_ptr + place, mask=inside, other=0)
    return place.to(tl.int64), inside, slot.to(tl.int64), (slot // num_slots).to(tl.int64)


def rows_of(num_pairs: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile, from the mean number of pairs per expert, so that experts with few pairs need little padding."""
    average = num_pairs // max(1, num_experts)
    if average <= 16:
        return 16
    return 32 if average <= 64 or dtype == torch.float32 else 64


def width_of(size: int, most: int) -> int:
    """Side of a tile over `size` columns: a power of two, at least 16, the minimum of the matrix unit."""
    return min(most, max(16, triton.next_power_of_2(size)))


def ragged(*sizes: int) -> bool:
    """Whether rows of one of these sizes are unaligned, so that every value needs its own address and mask in registers."""
    return any(size % 16 for size in sizes)


def check_reach(name: str, weights: Tensor) -> None:
    """Raises an error if offsets within one expert's matrix exceed 32 bits; offsets between experts are 64-bit."""
    reach = sum((size - 1) * stride for size, stride in zip(weights.shape[1:], weights.stride()[1:], strict=True)) + 1
    if reach >= MAX_REACH:
        raise ValueError(f"{name} must span fewer than {MAX_REACH} elements an expert with impl='triton', got {reach}.")
