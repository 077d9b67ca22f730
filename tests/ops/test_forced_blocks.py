"""The blocks that every query reads: the first ones of its sequence, and those that end with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL
from tinyonn.testing import assert_close_rms, dyn_nsa_case, impl_device

from .dyn_nsa_cases import compare

IMPLS = [ALL[1], "torch", "reference"]
FORCED = [(1, 2), (0, 1), (3, 1), (0, 4), (2, 3)]
# In the interpreter, rows that overflow take ten seconds a case: two of them always run.
CASES = [pytest.param(*forced, "triton", marks=[*ALL[1].marks, *[pytest.mark.slow] * (forced not in FORCED[:2])]) for forced in FORCED]
CASES += [pytest.param(*forced, impl) for forced in FORCED for impl in ("torch", "reference")]
TOKENS, BLOCK = 130, 16


def inputs(impl: str, **options: Any) -> dict[str, Tensor]:
    """Query, compressed keys and their lse, for blocks of one compressed key each."""
    device, dtype = (impl_device("triton"), torch.float32) if impl == "triton" else ("cpu", torch.float64)
    case = dyn_nsa_case(TOKENS, compress_size=BLOCK, dtype=dtype, **options)
    query, key, value = (case[name].to(device) for name in ("query", "key_compressed", "value_compressed"))
    lse = ops.compressed_attention(query, key, value, compress_size=BLOCK, num_keys=TOKENS, impl=impl)[1]
    return {"query": query, "key_compressed": key, "lse": lse}


def select(tensors: dict[str, Tensor], threshold: float, impl: str, **options: Any) -> ops.BlockSelection:
    query, key = tensors["query"], tensors["key_compressed"]
    thresholds = torch.full((*query.shape[:2], key.shape[2]), threshold, dtype=query.dtype, device=query.device)
    sizes = {"block_size": BLOCK, "compress_size": BLOCK, "num_keys": TOKENS}
    found = ops.select_blocks(**tensors, threshold=thresholds, **sizes, impl=impl, **options)
    return type(found)(*(x.cpu() for x in found))


def forced_of(position: int, first: int, local: int) -> set[int]:
    own = position // BLOCK
    return {block for block in range(own + 1) if block < first or own - block < local}


def listed(found: ops.BlockSelection, row: int, head: int) -> list[int]:
    indices: list[int] = found.indices[0, row, head, : found.counts[0, row, head]].tolist()
    return indices


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("first", "local"), FORCED)
def test_they_are_read_where_nothing_passes(first, local, impl):
    """With a gate of 1, each counted once, and with no slot beside them."""
    found = select(inputs(impl), 50.0, impl, forced_first=first, forced_local=local, max_blocks=first + local)
    for row in range(TOKENS):
        expected = forced_of(row, first, local)
        for head in range(2):
            assert listed(found, row, head) == sorted(expected)
            assert found.soft_counts[0, row, head] == len(expected)
    assert (found.bias == 0).all()
    assert found.overflow == 0


@pytest.mark.parametrize(("first", "local", "impl"), CASES)
def test_rows_that_overflow_keep_them(first, local, impl):
    """Of the blocks that pass, the slots that are left take those of the highest shares."""
    tensors = inputs(impl)
    found = select(tensors, -30.0, impl, forced_first=first, forced_local=local, max_blocks=first + local + 1)
    query, key = (tensors[name].cpu().double() for name in ("query", "key_compressed"))
    overflowing = 0
    for row in range(TOKENS):
        forced = forced_of(row, first, local)
        scores = torch.einsum("hd,mhd->hm", query[0, row], key[0, : (row + 1) // BLOCK].repeat_interleave(2, 1)) * 16**-0.5
        shares = scores.softmax(-1).unflatten(0, (2, 2)).mean(1)
        past = set(range(shares.shape[-1])) - forced
        overflowing += len(past) > 1
        for head in range(2):
            best = sorted(past, key=lambda block, head=head: -shares[head, block])[:1]
            assert listed(found, row, head) == sorted(forced | set(best))
    assert found.overflow == pytest.approx(overflowing / TOKENS)
    assert overflowing > 30


@pytest.mark.parametrize("impl", IMPLS)
def test_one_first_and_two_local_blocks_by_default(impl):
    tensors = inputs(impl)
    default, given = (select(tensors, -2.0, impl, **options) for options in ({}, {"forced_first": 1, "forced_local": 2}))
    assert all(torch.equal(a, b) for a, b in zip(default, given, strict=True))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=[*ALL[1].marks, pytest.mark.slow])])
@pytest.mark.parametrize("where", ["packed", "decoding"])
@pytest.mark.parametrize(("first", "local"), [(0, 1), (2, 3)])
def test_the_whole_is_exact_with_them(first, local, where, impl):
    """They are counted from the start of each sequence; outputs and every gradient against the oracle."""
    tensors = dyn_nsa_case(TOKENS, compress_size=16, queries=90 if where == "decoding" else None, dtype=torch.float32)
    bounds = {"cu_seqlens": torch.tensor([0, 17, 18, TOKENS], dtype=torch.int32)} if where == "packed" else {}
    options = {"block_size": 16, "compress_size": 16, "window": 20, "temperature": 1.5, "forced_first": first, "forced_local": local}
    device = impl_device("triton") if impl == "triton" else "cpu"
    counts = []

    def call(function: Any, **own: Any) -> Any:
        def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            there = {name: bound.to(leaves["query"].device) for name, bound in bounds.items()}
            result = function(**leaves, **options, **there, **own, max_blocks=7)
            counts.append(result.counts.cpu())
            return result.out, result.soft_counts

        return run

    compare(call(ops.dyn_nsa, impl=impl), call(reference.dyn_nsa), tensors, torch.float32, len(tensors), device)
    assert torch.equal(*counts)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_with_one_block_in_sight_attention_is_local(impl):
    """Only the own block: the selected branch is causal attention within blocks."""
    tensors = dyn_nsa_case(96, compress_size=16)
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 96, 4, 3)
    tensors["base"] = torch.full((2,), 30.0, dtype=torch.float64)
    options = {"block_size": 16, "compress_size": 16, "max_blocks": 1, "forced_first": 0, "forced_local": 1}
    result = ops.dyn_nsa(**tensors, **options, impl=impl)
    blocks = [tensors[name].unflatten(1, (6, 16))[0].transpose(1, 2) for name in ("query", "key", "value")]
    expected = torch.nn.functional.scaled_dot_product_attention(*blocks, is_causal=True, enable_gqa=True)
    assert_close_rms(result.out, expected.transpose(1, 2).flatten(0, 1)[None], 1e-12)
    assert (result.counts == 1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("threshold", "temperature"), [(-1e30, 1.0), (-torch.inf, 1.0), (-30.0, 2e-38)])
def test_the_most_important_blocks_stay_however_low_the_threshold(threshold, temperature, impl):
    """The distance to such a threshold rounds all differences between blocks away."""
    tensors = inputs(impl)
    expected, found = (select(tensors, *given, max_blocks=4) for given in ((-30.0, impl), (threshold, impl)))
    low = select(tensors, threshold, impl, max_blocks=4, temperature=temperature)
    for one in (found, low):
        assert torch.equal(one.indices, expected.indices)
        assert torch.equal(one.counts, expected.counts)


@pytest.mark.parametrize("impl", IMPLS)
def test_shares_above_1_of_an_lse_that_is_too_small_keep_their_order(impl):
    tensors = inputs(impl)
    expected = select(tensors, -30.0, impl, max_blocks=4)
    found = select({**tensors, "lse": tensors["lse"] - 5}, -30.0, impl, max_blocks=4)
    assert torch.equal(found.indices, expected.indices)
