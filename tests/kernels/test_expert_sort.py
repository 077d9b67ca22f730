"""Pairs sorted by expert, against Python's stable sort."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tinyonn.testing import IMPLS, impl_device, poisoned

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")


def random_index(tokens: int, slots: int, experts: int, low: int = 0, high: int = 1) -> Tensor:
    """Indices from `low` to E - 1 + `high`: by default some are E."""
    return torch.randint(low, experts + high, (tokens, slots), generator=torch.Generator().manual_seed(0))


CASES = {
    "few": (random_index(30, 3, 5), 5),
    "out-of-range": (random_index(30, 3, 5, low=-3, high=4), 5),
    "one-expert": (random_index(40, 2, 1), 1),
    "one-token": (random_index(1, 9, 8), 8),
    "one-pair": (torch.zeros(1, 1, dtype=torch.long), 1),
    "all-to-one": (torch.full((150, 2), 3), 6),
    "all-unused": (torch.full((20, 2), 6), 6),
    "every-expert": (torch.arange(12).repeat(11, 1), 12),
    "many-experts": (random_index(60, 8, 4096), 4096),
    "several-chunks": (random_index(700, 2, 70), 70),
    "int32": (random_index(30, 3, 33).int(), 33),
    "strided": (random_index(30, 8, 7)[:, ::2], 7),
    "extremes": (torch.tensor([[2**62, -(2**62), 1], [2**32 + 1, 0, 2]]), 3),
}


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_sorted_by_expert_then_token_then_slot(name, rows):
    from tinyonn_kernels.experts.expert_sort import sort_pairs

    index, experts = CASES[name]
    with poisoned():
        pairs = sort_pairs(index.to(DEVICE), experts, rows)
    flat = index.reshape(-1).tolist()
    wanted = sorted((place for place, expert in enumerate(flat) if 0 <= expert < experts), key=lambda place: flat[place])
    offsets = pairs.offsets.tolist()
    assert pairs.slots[: len(wanted)].tolist() == wanted
    assert offsets == [sum(0 <= x < expert for x in flat) for expert in range(experts)] + [len(wanted)]
    tiles = [(expert, row) for expert, (start, end) in enumerate(pairwise(offsets)) for row in range(start, end, rows)]
    found = pairs.tile_expert.tolist()
    assert list(zip(found, pairs.tile_row.tolist(), strict=True))[: len(tiles)] == tiles
    assert set(found[len(tiles) :]) <= {-1}


def test_chunks_longer_than_a_block(monkeypatch):
    from tinyonn_kernels.experts import expert_sort

    index = random_index(600, 1, 3)
    short = expert_sort.sort_pairs(index.to(DEVICE), 3, 16)
    monkeypatch.setattr(expert_sort, "LEAST_CHUNK", 512)
    long = expert_sort.sort_pairs(index.to(DEVICE), 3, 16)
    used = int(short.offsets[-1])
    assert 300 < used < 600
    assert torch.equal(short.slots[:used], long.slots[:used])


def test_more_pairs_than_32_bit_places_are_refused():
    from tinyonn_kernels.experts.expert_sort import sort_pairs

    with pytest.raises(ValueError, match="top_k_index must have fewer than 1073741824 slots with impl='triton', got 1073741824"):
        sort_pairs(torch.empty((1 << 27, 8), dtype=torch.int32, device="meta"), 8, 16)
