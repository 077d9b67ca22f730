"""Compression starts as the mean, learns from there, and finds blocks wherever rows begin."""

from __future__ import annotations

import pytest
import torch

from tinyonn.nn import BlockCompression
from tinyonn.nn.block_compression import block_starts
from tinyonn.testing import assert_close_rms


def learnt(size: int = 16, heads: int = 2, dim: int = 4) -> BlockCompression:
    torch.manual_seed(0)
    maps = BlockCompression(heads, dim, size, dtype=torch.float64)
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return maps


@pytest.mark.parametrize("learnable", [False, True], ids=["mean", "learnable"])
def test_it_starts_as_the_mean_of_whole_blocks(learnable):
    x = torch.randn(2, 50, 2, 4)
    got = BlockCompression(2, 4, 16, learnable=learnable)(x)
    assert torch.equal(got, torch.stack([x[:, begin : begin + 16].mean(1) for begin in (0, 16, 32)], 1))


def test_the_learnable_map_is_the_one_documented():
    maps, x = learnt(), torch.randn(1, 40, 2, 4, dtype=torch.float64)
    got = maps(x)
    for block in range(2):
        for head in range(2):
            places = [x[0, block * 16 + i, head] + maps.position[i, head] for i in range(16)]
            hidden = sum(torch.nn.functional.silu(maps.up[head].T @ place) for place in places) / 16
            assert_close_rms(got[0, block, head], sum(places) / 16 + maps.down[head].T @ hidden, 1e-14)


def test_the_place_within_a_block_matters():
    maps, x = learnt(), torch.randn(1, 16, 2, 4, dtype=torch.float64)
    assert (maps(x) - maps(x.flip(1))).abs().max() > 1e-3


def test_no_parameter_of_the_start_is_stuck():
    maps = BlockCompression(2, 4, 16)
    x, target = torch.randn(1, 32, 2, 4), torch.randn(1, 2, 2, 4)
    (maps(x) * target).sum().backward()
    assert maps.position.grad.abs().max() > 0
    assert maps.down.grad.abs().max() > 0
    with torch.no_grad():
        maps.down -= 0.1 * maps.down.grad
    maps.up.grad = None
    (maps(x) * target).sum().backward()
    assert maps.up.grad.abs().max() > 0


def test_rows_that_begin_later_hold_their_own_blocks():
    maps, x = learnt(), torch.randn(2, 70, 2, 4, dtype=torch.float64)
    got = maps(x, block_starts(70, 16, torch.tensor([0, 13], dtype=torch.int32), None))
    assert torch.equal(got[0], maps(x[:1])[0])
    assert torch.equal(got[1, :3], maps(x[1:, 13:])[0])


def test_packed_sequences_hold_their_own_blocks():
    maps, x = learnt(), torch.randn(1, 96, 2, 4, dtype=torch.float64)
    bounds = [0, 5, 40, 40, 96]
    got = maps(x, block_starts(96, 16, None, torch.tensor(bounds, dtype=torch.int32)))
    for begin, end in ((5, 40), (40, 96)):
        alone = maps(x[:, begin:end])
        assert torch.equal(got[:, begin // 16 : begin // 16 + alone.shape[1]], alone)
