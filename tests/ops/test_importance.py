"""The importance that a block's gate is made of: its share of the query's attention, or that share against a uniform one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import IMPLS as ALL
from tinyonn.testing import assert_close_rms, dyn_nsa_case, impl_device

IMPLS = [ALL[1], "torch", "reference"]
BLOCK = 16


def select(query: Tensor, key: Tensor, threshold: float, impl: str, **options: Any) -> ops.BlockSelection:
    """Selection among blocks of 16 positions, of one compressed key each, at one threshold for all rows."""
    device, dtype = (impl_device("triton"), torch.float32) if impl == "triton" else ("cpu", torch.float64)
    query, key = query.to(device, dtype), key.to(device, dtype)
    sizes = {"compress_size": BLOCK, "num_keys": key.shape[1] * BLOCK}
    lse = ops.compressed_attention(query, key, key, **sizes, impl=impl)[1]
    thresholds = torch.full((*query.shape[:2], key.shape[2]), threshold, dtype=dtype, device=device)
    found = ops.select_blocks(query, key, lse, thresholds, block_size=BLOCK, **sizes, impl=impl, **options)
    return type(found)(*(x.cpu() for x in found))


def forced_counts(queries: int, tokens: int) -> Tensor:
    """(queries,) how many of the first, the previous and the own block there are."""
    return (torch.arange(tokens - queries, tokens) // BLOCK + 1).clamp(max=3)


def drawn(blocks: int, spread: float, queries: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(blocks)
    return (
        torch.randn(1, queries, 4, 8, generator=generator, dtype=torch.float64) * spread,
        torch.randn(1, blocks, 2, 8, generator=generator, dtype=torch.float64),
    )


def spread_evenly(blocks: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Every query's whole attention lies on `chosen` far blocks, in equal parts: no rule could pass more of them."""
    query, key = torch.zeros(1, 24, 4, 8, dtype=torch.float64), torch.zeros(1, blocks, 2, 8, dtype=torch.float64)
    query[..., 0] = 300.0
    key[:, 1 : 1 + chosen, :, 0] = 1.0
    return query, key


def split_over_heads(blocks: int, chosen: int) -> tuple[Tensor, Tensor]:
    """The same far blocks, but each of a group's heads attends to one half of them."""
    query, key = torch.zeros(1, 24, 4, 8, dtype=torch.float64), torch.zeros(1, blocks, 2, 8, dtype=torch.float64)
    for half in range(2):
        query[:, :, half::2, half] = 300.0
        key[:, 1 + half : 1 + chosen : 2, :, half] = 1.0
    return query, key


# In the interpreter a row of 40 blocks takes long: one threshold of four always runs.
BOUNDED = [
    pytest.param(
        blocks,
        threshold,
        "triton",
        marks=[*ALL[1].marks, *[pytest.mark.slow] * (blocks == 40 and threshold > -3)],
        id=f"{blocks}-{threshold}",
    )
    for blocks in (8, 40)
    for threshold in (-0.6, -1.5, -2.0, -3.2)
]
BOUNDED += [(*one.values[:2], impl) for one in BOUNDED for impl in ("torch", "reference")]


@pytest.mark.parametrize(("blocks", "threshold", "impl"), BOUNDED)
def test_at_most_e_to_the_minus_threshold_blocks_pass(blocks, threshold, impl):
    """Whatever the length and the scores; so this many slots beside the forced blocks never overflow."""
    most = math.floor(math.exp(-threshold))
    tight = min(most, blocks - 4)
    slots = {"max_blocks": 3 + most}
    inputs = (drawn(blocks, 0.0), drawn(blocks, 1.0), drawn(blocks, 6.0), split_over_heads(blocks, tight), spread_evenly(blocks, tight))
    for query, key in inputs:
        free, limited = (select(query, key, threshold, impl, **options) for options in ({"max_blocks": blocks + 3}, slots))
        far = free.counts - forced_counts(24, blocks * BLOCK)[None, :, None]
        assert far.max() <= most
        assert limited.overflow == 0
        assert torch.equal(limited.counts, free.counts)
    assert (far == tight).all()  # the bound is reached


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chosen", [3, 8, 13])
def test_the_bound_holds_where_shares_equal_the_threshold(chosen, impl):
    """Rounding decides which side of the threshold they lie on; either way there are as many as e^(-threshold)."""
    found = select(*spread_evenly(24, chosen), -math.log(chosen), impl, max_blocks=3 + chosen)
    assert found.overflow == 0
    assert found.counts.max() <= 3 + chosen


@pytest.mark.parametrize("impl", IMPLS)
def test_a_relative_threshold_has_no_such_bound(impl):
    """At the same thresholds, even attention over more blocks passes none of their shares, and every block of the relative rule."""
    passed: dict[str, list[int]] = {}
    for importance in ("share", "relative"):
        for blocks in (8, 40):
            found = select(*drawn(blocks, 0.0), -0.6, impl, max_blocks=blocks, importance=importance)
            passed.setdefault(importance, []).append(int(found.counts.max()))
    assert passed == {"share": [3, 3], "relative": [8, 40]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("importance", [None, "share", "relative"])
def test_importance_is_its_formula(importance, impl):
    """Of the last query, from a softmax; None for the default."""
    query, key = drawn(9, 1.0, queries=1)
    scores = torch.einsum("hd,mhd->hm", query[0, 0], key[0].repeat_interleave(2, 1)) * 8**-0.5
    share = scores.softmax(-1).unflatten(0, (2, 2)).mean(1)  # (K, blocks)
    z = (share * (9 if importance == "relative" else 1)).log()
    threshold, temperature = (-1.5, 2.0) if importance == "relative" else (-3.5, 2.0)
    c = ((z - threshold) / temperature).clamp(0, 1)
    options = {} if importance is None else {"importance": importance}
    found = select(query, key, threshold, impl, temperature=temperature, max_blocks=9, **options)
    for head in range(2):
        gates = torch.zeros(9, dtype=torch.float64)
        listed = found.indices[0, 0, head, : found.counts[0, 0, head]].long()
        gates[listed] = found.bias[0, 0, head, : len(listed)].double().exp()
        expected = c[head] ** 2 * (3 - 2 * c[head])
        expected[[0, 7, 8]] = 1
        assert ((expected > 0) & (expected < 1)).sum() >= 2
        assert_close_rms(gates, expected, 1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_whole_function_takes_shares_by_default(impl):
    tensors, options = dyn_nsa_case(330), {"compress_size": 32, "window": 40, "impl": impl}
    default, share, relative = (
        ops.dyn_nsa(**tensors, **options, **rule) for rule in ({}, {"importance": "share"}, {"importance": "relative"})
    )
    assert torch.equal(default.out, share.out)
    assert not torch.equal(default.counts, relative.counts)
