"""Launches over tensors without data that cover every configuration of the kernels for experts, for the resources tool.

Few and many neurons, sizes that are no multiple of a tile, every activation except the simplest, with biases except for the smallest tiles,
and the most expensive kind of surprise. 4096 tokens have 8 slots each, of 64 experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._tune import compiled_for
from .expert_mlp_bwd import expert_grad_pre
from .expert_mlp_fwd import expert_gate_up
from .expert_outer import expert_outer
from .expert_rows import Source, expert_rows, products_into
from .expert_sort import SortedPairs, sort_pairs

TOKENS, SLOTS, EXPERTS = 4096, 8, 64
PAIRS = TOKENS * SLOTS

# label, dtype, F, I, rows of a tile, activation
SHAPES = (
    ("bfloat16-I8", torch.bfloat16, 512, 8, 16, "silu"),
    ("bfloat16-I64", torch.bfloat16, 1024, 64, 16, "silu"),
    ("bfloat16-I77-F1001", torch.bfloat16, 1001, 77, 64, "clamped_swiglu"),
    ("bfloat16-I768-R64", torch.bfloat16, 2048, 768, 64, "gelu"),
    ("float16-I128", torch.float16, 1024, 128, 32, "gelu_tanh"),
    ("float32-I64", torch.float32, 512, 64, 16, "clamped_silu"),
    ("float32-I77-F1001", torch.float32, 1001, 77, 32, "gelu"),
)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _example(dtype: torch.dtype, features: int, neurons: int, rows: int) -> tuple[Tensor, Tensor, Tensor, SortedPairs]:
    """hidden_states, gate_up_proj, down_proj and pairs."""
    shapes = ((TOKENS, features), (EXPERTS, 2 * neurons, features), (EXPERTS, features, neurons))
    x, up, down = (_empty(*shape, dtype=dtype) for shape in shapes)
    return x, up, down, sort_pairs(_empty(TOKENS, SLOTS, dtype=torch.int64), EXPERTS, rows)


def _products(dtype: torch.dtype, features: int, neurons: int, rows: int, activation: str) -> None:
    x, up, down, pairs = _example(dtype, features, neurons, rows)
    pre, h = x.new_empty(PAIRS, 2 * neurons), x.new_empty(PAIRS, neurons)
    interleaved = activation == "clamped_swiglu"
    up = up.mT.contiguous().mT if interleaved else up
    up_bias = up[:, :, 0].contiguous() if interleaved else None
    expert_gate_up(x, up, up_bias, pre, h, pairs, SLOTS, activation, True, interleaved, 7.0)

    biased = rows > 16
    down_bias = down[:, :, 0].contiguous() if biased else None
    down = down.mT.contiguous().mT if features % 2 == 1 else down
    weights, index = _empty(TOKENS, SLOTS), _empty(TOKENS, SLOTS, dtype=torch.int64)
    expert_grad_pre(x, x, down, down_bias, pre, weights, index, pairs, activation, True, "expert", biased, 7.0)


def _down(dtype: torch.dtype, features: int, neurons: int, rows: int, activation: str) -> None:
    x, _, down, pairs = _example(dtype, features, neurons, rows)
    weights, index = _empty(TOKENS, SLOTS), _empty(TOKENS, SLOTS, dtype=torch.int64)
    expert_rows(x.new_empty(PAIRS, neurons), down.mT, down[:, :, 0], weights, index, pairs, False)
    out = down.mT.contiguous() if features % 2 == 1 else down.mT
    right_sum = out[:, 0].contiguous() if rows > 16 else None
    expert_outer(x.new_empty(PAIRS, neurons), x, weights, out, None, right_sum, index, pairs, False)


def _up(dtype: torch.dtype, features: int, neurons: int, rows: int, activation: str) -> None:
    x, up, _, pairs = _example(dtype, features, neurons, rows)
    odd = features % 2 == 1
    out = up.mT.contiguous().mT if odd else up
    left_sum = out[:, :, 0].contiguous() if rows > 16 else None
    weights, index = _empty(TOKENS, SLOTS), _empty(TOKENS, SLOTS, dtype=torch.int64)
    expert_outer(x.new_empty(PAIRS, 2 * neurons), x, weights, out, left_sum, None, index, pairs, odd)


def _gradient(dtype: torch.dtype, features: int, neurons: int, rows: int, activation: str) -> None:
    x, up, _, pairs = _example(dtype, features, neurons, rows)
    index = _empty(TOKENS, SLOTS, dtype=torch.int64)
    expert_rows(x.new_empty(PAIRS, 2 * neurons), up, None, None, index, pairs, activation == "clamped_swiglu")


def _linear(by: Source, weighed: bool, dtype: torch.dtype) -> None:
    """Projections of one row per token, or per slot, to 3 · 64 outputs and back."""
    features, outputs = (192, 1024) if weighed else (1024, 192)
    pairs = sort_pairs(_empty(TOKENS, SLOTS, dtype=torch.int64), EXPERTS, 32)
    source = _empty(PAIRS if by == "slot" else TOKENS, features, dtype=dtype)
    weight, rows = _empty(EXPERTS, outputs, features, dtype=dtype), _empty(PAIRS, outputs, dtype=dtype)
    products_into(rows, source, by, weight.mT, weight[:, :, 0], _empty(TOKENS, SLOTS) if weighed else None, SLOTS, pairs)


def _sort(dtype: torch.dtype, experts: int) -> None:
    sort_pairs(_empty(8192, 8, dtype=dtype), experts, 16)


def offered(arch: int) -> dict[str, Callable[[], None]]:
    """The same launches on every architecture, with its configurations."""
    launches: dict[str, Callable[[], None]] = {
        "int64-E4096": partial(_sort, torch.int64, 4096),
        "int32-E64": partial(_sort, torch.int32, 64),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for by in ("token", "slot"):
            for weighed in (False, True):
                name = f"{str(dtype).removeprefix('torch.')}-linear-{by}{'-summed' if weighed else ''}"
                launches[name] = partial(_linear, by, weighed, dtype)
    for label, *rest in SHAPES:
        launches[label] = partial(_products, *rest)
        launches |= {f"{label}-{name}": partial(launch, *rest) for name, launch in (("down", _down), ("up", _up), ("gradient", _gradient))}
    return compiled_for(arch, launches)
