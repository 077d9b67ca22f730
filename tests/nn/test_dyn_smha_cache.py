"""Decoding with DynSMHA's cache equals one pass over the whole text."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn.nn import DynSMHA, DynSMHACache
from tinyonn.testing import assert_close_rms

MODES = ("per_head", "composite")
every_mode = pytest.mark.parametrize("mode", MODES)


def layer(mode: str, **options: Any) -> DynSMHA:
    torch.manual_seed(0)
    return DynSMHA(12, 4, 6, **({"mode": mode, "target_k": 2.5, "bias": True, "dtype": torch.float64} | options)).eval()


def tokens_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoded(module: DynSMHA, x: Tensor, sizes: list[int], cache: DynSMHACache) -> Tensor:
    assert sum(sizes) == x.shape[1]
    return torch.cat([module(part, cache=cache) for part in x.split(sizes, 1)], 1)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("sizes", [[1] * 70, [40, *[1] * 30], [3, 37, 1, 29], [70]], ids=["one by one", "prefill", "chunks", "whole"])
@every_mode
def test_decoding_equals_one_pass(mode, sizes, grad):
    module, x = layer(mode), tokens_of(2, 70)
    cache = DynSMHACache()
    with torch.set_grad_enabled(grad):
        out = decoded(module, x, sizes, cache)
    assert cache.length == 70
    assert_close_rms(out, module(x), 1e-12, "output")


@every_mode
def test_left_padding(mode):
    module, x = layer(mode), tokens_of(2, 50)
    cache = DynSMHACache(torch.tensor([7, 0]))
    x[0, :7] = torch.nan
    with torch.no_grad():
        out = decoded(module, x, [5, 20, *[1] * 25], cache)  # the first piece of the first row is padding alone
        assert_close_rms(out[0, 7:], module(x[:1, 7:])[0], 1e-12, "row with padding")
        assert_close_rms(out[1], module(x[1:])[0], 1e-12, "other row")
    assert (out[0, :7] == 0).all()


def test_a_token_enters_only_the_caches_of_its_own_heads():
    module, x = layer("per_head"), tokens_of(2, 200)
    cache = DynSMHACache()
    with torch.no_grad():
        decoded(module, x, [100, 60, *[1] * 40], cache)
        routing = module.route(x.flatten(0, 1))
    counts = torch.zeros(400, 7, dtype=torch.int64).scatter_(1, routing.top_k_index, 1)[:, :6].view(2, 200, 6).sum(1)
    assert torch.equal(cache._pages.lengths, counts)
    pages = -(-counts // 32)
    assert torch.equal(cache._pages.used, pages.sum(1))
    assert int(cache._pages.used.max()) <= int(counts.sum(1).max()) // 32 + 6


@every_mode
def test_rows_may_be_reordered_repeated_and_left_out(mode):
    module, x = layer(mode), tokens_of(3, 40)
    cache = DynSMHACache(torch.tensor([4, 0, 9]))
    index = torch.tensor([2, 0, 0, 1])
    after = tokens_of(4, 20, seed=8)
    with torch.no_grad():
        module(x, cache=cache)
        cache.select_rows(index)
        out = decoded(module, after, [1] * 20, cache)
        whole = torch.cat([x[index], after], 1)
        expected = module(whole, key_start=torch.tensor([4, 0, 9])[index])[:, 40:]
    assert_close_rms(out, expected, 1e-12, "output")


@every_mode
def test_forgetting_tokens_is_as_if_they_had_not_come(mode):
    module, x = layer(mode), tokens_of(2, 80)
    cache = DynSMHACache()
    with torch.no_grad():
        for _ in range(20):
            module(x, cache=cache)
            cache.crop(-45)
            assert cache.length == 35
            out = module(x[:, 35:60], cache=cache)
            cache.crop(0)
        assert_close_rms(out, module(x[:, :60])[:, 35:], 1e-12, "output")
        most = 0 if cache._pages is None else cache._pages.keys.shape[1]
        assert most <= 2 * (80 * 6 // 32 + 6)  # pages are used again
        cache.crop(99)
        cache.reset()
        assert cache.length == 0
        assert_close_rms(module(x, cache=cache), module(x), 1e-12, "after a reset")


@every_mode
def test_copies_are_independent(mode):
    module, x = layer(mode), tokens_of(1, 40)
    cache = DynSMHACache()
    with torch.inference_mode():
        module(x[:, :30], cache=cache)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with torch.no_grad():
        decoded(module, tokens_of(1, 10, seed=4), [1] * 10, cache)
        for one in copies:
            assert_close_rms(decoded(module, x[:, 30:], [4, 6], one), module(x)[:, 30:], 1e-12, "copy")


@every_mode
def test_gradients_of_the_first_piece_are_those_without_a_cache(mode):
    module, x = layer(mode), tokens_of(2, 9)
    grads = []
    for cache in (None, DynSMHACache()):
        module.zero_grad()
        module(x, cache=cache).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.expert_parameters().values()])
    for plain, cached in zip(*grads, strict=True):
        torch.testing.assert_close(plain, cached, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype):
    module, x = layer("per_head", dtype=dtype), tokens_of(2, 40).to(dtype)
    with torch.no_grad():
        out = decoded(module, x, [20, *[1] * 20], DynSMHACache())
    assert out.dtype == dtype
    assert_close_rms(out, module(x), 1e-5 if dtype == torch.float32 else 2e-2, "output")


def test_bad_rows_and_lengths_are_refused_and_change_nothing():
    cache = DynSMHACache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"index must name rows 0 … 1, got \[-1, 1\]"):
        cache.select_rows(torch.tensor([-1, 1]))
    with pytest.raises(TypeError, match="index must be a tensor of integers, got list"):
        cache.select_rows([0])
    with pytest.raises(TypeError, match="length must be"):
        cache.crop(2.5)
    assert cache.key_start.tolist() == [1, 0]


def test_bad_caches_are_refused_and_not_changed():
    module, other = layer("per_head"), layer("per_head", max_num_experts=9)
    x = tokens_of(2, 5)
    cache = DynSMHACache()
    with torch.no_grad():
        module(x, cache=cache)
        with pytest.raises(ValueError, match=r"the cache holds 2 row\(s\), got 1: begin another"):
            module(x[:1], cache=cache)
        with pytest.raises(ValueError, match=r"the cache holds 2 row\(s\) of 6 heads, got 2 of 9: begin another"):
            other(x, cache=cache)
        with pytest.raises(ValueError, match="must be None beside a cache"):
            module(x, cache=cache, key_start=torch.tensor([0, 0]))
        assert cache.length == 5
    with pytest.raises(TypeError, match=r"key_start must be a torch\.Tensor, got list"):
        DynSMHACache([0])
    with pytest.raises(TypeError, match=r"key_start must be int32 or int64, got torch\.float32"):
        DynSMHACache(torch.zeros(2))
    with pytest.raises(ValueError, match=r"key_start of the cache must have shape \(2,\), got \(3,\)"):
        module(x, cache=DynSMHACache(torch.zeros(3, dtype=torch.int64)))
