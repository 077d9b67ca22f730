"""What comes later does not reach what came before, NaN and infinity included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import dyn_nsa_case

IMPLS = ["torch", "reference"]
TOKENS, SIZE = 150, 16  # the last compressed key ends at 144, the last whole block at 128

Tensors = dict[str, Tensor]


def whole(t: Tensors, impl: str) -> tuple[Tensor, ...]:
    inputs = [t[name] for name in ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")]
    result = ops.dyn_nsa(*inputs, block_size=32, compress_size=SIZE, window=40, max_blocks=4, impl=impl)
    return result.out, result.counts, result.tau, result.soft_counts


def compressed(t: Tensors, impl: str) -> tuple[Tensor, ...]:
    return ops.compressed_attention(
        t["query"], t["key_compressed"], t["value_compressed"], compress_size=SIZE, num_keys=t["key"].shape[1], impl=impl
    )


def selection(t: Tensors, impl: str) -> tuple[Tensor, ...]:
    lse = compressed(t, "torch")[1]
    threshold = torch.full((*t["query"].shape[:2], 2), -0.5, dtype=torch.float64)
    options = {"block_size": 32, "compress_size": SIZE, "max_blocks": 4, "num_keys": t["key"].shape[1], "impl": impl}
    return ops.select_blocks(t["query"], t["key_compressed"], lse, threshold, **options)[:4]


def block_sparse(t: Tensors, impl: str) -> tuple[Tensor, ...]:
    """The first and the own block, even where they are one: what slots lie behind `counts` must not matter."""
    own = (torch.arange(t["key"].shape[1])[-t["query"].shape[1] :] // 32).int()
    indices = torch.stack([torch.where(own > 1, 1, own), own], -1)[None, :, None].expand(1, -1, 2, 2)
    return ops.block_sparse_attention(
        t["query"], t["key"], t["value"], indices, (own > 1).int()[None, :, None].expand(1, -1, 2) + 1, block_size=32, impl=impl
    )


def window(t: Tensors, impl: str) -> tuple[Tensor, ...]:
    return (ops.sliding_window_attention(t["query"], t["key"], t["value"], 40, impl=impl),)


CALLS: dict[str, tuple[Callable[[Tensors, str], tuple[Tensor, ...]], tuple[str, ...]]] = {
    "dyn_nsa": (whole, ("key", "value", "key_compressed", "value_compressed")),
    "compressed": (compressed, ("key_compressed", "value_compressed")),
    "select": (selection, ("key_compressed",)),
    "block sparse": (block_sparse, ("key", "value")),
    "window": (window, ("key", "value")),
}
CASES = [(op, name) for op, (_, names) in CALLS.items() for name in names]


def seen_from(name: str, row: int) -> int:
    """First position that sees this row of a key or value."""
    return (row + 1) * SIZE - 1 if name.endswith("compressed") else row


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [TOKENS, 9], ids=["all", "decoding"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("op", "name"), CASES, ids=lambda x: x)
def test_what_is_not_finite_stays_behind_itself(op, name, value, queries, impl):
    call, _ = CALLS[op]
    tensors = dyn_nsa_case(TOKENS, compress_size=SIZE, queries=queries)
    clean = call(tensors, impl)
    row = 8 if name.endswith("compressed") else 145
    broken = {**tensors, name: tensors[name].clone()}
    broken[name][0, row, 1, 3] = value
    got = call(broken, impl)
    first = seen_from(name, row) - (TOKENS - queries)
    assert 0 < first < queries
    for mine, theirs in zip(got, clean, strict=True):
        if mine.dim() > 0:
            torch.testing.assert_close(mine[:, :first], theirs[:, :first], rtol=1e-12, atol=1e-12, equal_nan=True)
    if op != "select" and math.isnan(value):
        reached = got[0][:, first:].isfinite().all(-1).all(0)
        assert not reached[:, 2:].any()  # every query behind it, in both heads of its group
        assert reached[:, :2].all()


@pytest.mark.parametrize("name", ["key", "value", "key_compressed", "value_compressed"])
def test_gradients_of_earlier_queries_are_those_without_it(name):
    tensors = dyn_nsa_case(TOKENS, compress_size=SIZE)
    row = 8 if name.endswith("compressed") else 145
    first = seen_from(name, row)
    gradients = []
    for number in (0.0, math.nan):
        leaves = {part: tensor.clone() for part, tensor in tensors.items()}
        leaves[name][0, row, 1, 3] += number
        leaves["query"].requires_grad_()
        out, _, _, soft_counts = whole(leaves, "torch")
        loss = out[:, :first].square().sum() + soft_counts[:, :first].sum()
        gradients.append(torch.autograd.grad(loss, leaves["query"])[0][:, :first])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
