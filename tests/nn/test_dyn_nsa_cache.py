"""Rows and positions of a decoding cache: selected, repeated and cropped, with and without padding."""

from __future__ import annotations

import pytest
import torch

from tinyonn.nn import DynNSAAttention, DynNSACache, DynNSAOptions


def layer() -> DynNSAAttention:
    torch.manual_seed(0)
    options = DynNSAOptions(compress_size=16, block_size=16, window=16, max_blocks=8)
    return DynNSAAttention(32, 2, options=options).double().eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STARTS = [None, torch.tensor([0, 21, 5])]


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS, ids=["whole", "padded"])
@pytest.mark.parametrize("index", [[2, 0, 1], [0, 0, 2, 2], [1]], ids=["reordered", "repeated", "dropped"])
def test_selected_rows_continue_as_if_they_had_been_alone(start, index):
    module, before, after = layer(), tokens(3, 70, 32), tokens(len(index), 40, 32, seed=1)
    cache = DynNSACache(start)
    module(before, cache=cache)
    cache.select_rows(torch.tensor(index))
    parts = [module(part, cache=cache).out for part in after.split([1, 39], 1)]
    own = None if start is None else start[index]
    whole = module(torch.cat([before[index], after], 1), key_start=own).out[:, 70:]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS, ids=["whole", "padded"])
@pytest.mark.parametrize("length", [70, 64, 41, 0])
def test_a_cropped_cache_continues_from_what_is_left(start, length):
    module, before, after = layer(), tokens(3, 70, 32), tokens(3, 90, 32, seed=1)
    cache = DynNSACache(start)
    for part in before.split([50, 20], 1):
        module(part, cache=cache)
    cache.crop(length)
    got = torch.cat([module(part, cache=cache).out for part in after.split([1, 8, 81], 1)], 1)
    whole = module(torch.cat([before[:, :length], after], 1), key_start=start).out[:, length:]
    torch.testing.assert_close(got, whole, rtol=1e-10, atol=1e-10)


def test_a_cache_crops_to_no_more_than_it_has():
    cache = DynNSACache()
    with pytest.raises(ValueError, match=r"length must be 0 … 0, got 1\."):
        cache.crop(1)
