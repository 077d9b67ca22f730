"""Unions of lists against sets of first key rows: each block once, in order, with the queries that list it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyonn.testing import IMPLS, impl_device

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")
BOUNDS = {
    "plain": {},
    "packed": {"cu_seqlens": [0, 5, 5, 18, 37]},
    "padded": {"key_start": [3, 0], "key_end": [37, 30]},
}


def lists_within(start: Tensor, end: Tensor, batch: int, num_kv: int, num_slots: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Ascending blocks of each query's own sequence up to its own; every seventh list is empty, and rows outside have rubbish."""
    generator = torch.Generator().manual_seed(3)
    tokens = start.shape[1]
    indices = torch.full((batch, tokens, num_kv, num_slots), -1, dtype=torch.int32)
    counts = torch.full((batch, tokens, num_kv), 99, dtype=torch.int32)
    for b in range(batch):
        for t in range(tokens):
            first, last = int(start[b % len(start), t]), int(end[b % len(end), t])
            for head in range(num_kv if first <= t < last else 0):
                own = (t - first) // block_size
                chosen = sorted(torch.randperm(own + 1, generator=generator)[:num_slots].tolist()) if t % 7 else []
                indices[b, t, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                counts[b, t, head] = len(chosen)
    return indices, counts


@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("queries", [16, 8, 5, 4, 2])
def test_a_tile_lists_each_block_once_with_its_queries(queries, bounds):
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_lists import merge_lists

    tokens, num_kv, block_size = 37, 2, 4
    batch = 2 if bounds == "padded" else 1
    where = {name: torch.tensor(bound, dtype=torch.int32) for name, bound in BOUNDS[bounds].items()}
    options = [where.get(name) for name in ("cu_seqlens", "key_start", "key_end")]
    query = torch.zeros(batch, tokens, num_kv, 1)
    whole = geometry_of(query, tokens, *options)
    indices, counts = lists_within(whole.start, whole.end, batch, num_kv, 5, block_size)
    on_device = geometry_of(query.to(DEVICE), tokens, *(None if bound is None else bound.to(DEVICE) for bound in options))
    begin = 3  # a chunk of tokens, whose lists have the batch stride of the whole
    rows = (slice(None), slice(begin, None))
    merged = merge_lists(indices.to(DEVICE)[rows], counts.to(DEVICE)[rows], on_device.of_chunk(begin), queries, block_size)
    assert merged.queries == queries
    assert merged.lengths.shape == (batch, -(-(tokens - begin) // merged.queries), num_kv)
    total = 0
    for b, tile, head in torch.cartesian_prod(*(torch.arange(size) for size in merged.lengths.shape)).tolist():
        wanted: dict[int, int] = {}
        for lane in range(merged.queries):
            t = begin + tile * merged.queries + lane
            if t < tokens and int(whole.start[b, t]) <= t < int(whole.end[b, t]):
                for block in indices[b, t, head, : counts[b, t, head]].tolist():
                    first = int(whole.start[b, t]) + block * block_size
                    wanted[first] = wanted.get(first, 0) | 1 << lane
        length = int(merged.lengths[b, tile, head])
        found = [merged.blocks[b, tile, head, :length].tolist(), merged.members[b, tile, head, :length].tolist()]
        assert found == [sorted(wanted), [wanted[first] for first in sorted(wanted)]]
        total += length
    assert total < int(counts[counts < 99].sum())  # blocks were shared


def test_one_query_keeps_its_list():
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_lists import merge_lists

    indices, counts = torch.zeros(1, 5, 1, 3, dtype=torch.int32), torch.ones(1, 5, 1, dtype=torch.int32)
    merged = merge_lists(indices, counts, geometry_of(torch.zeros(1, 5, 9, 1), 5, None, None, None), 1, 16)
    assert merged.queries == 1
    assert merged.blocks is indices
    assert merged.lengths is counts


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "group", "tile"),
    [
        (90, torch.bfloat16, 128, 16, (4, 64)),
        (100, torch.float16, 64, 32, (2, 64)),
        (90, torch.bfloat16, 128, 24, (1, 32)),
        (90, torch.bfloat16, 128, 64, (1, 64)),
        (90, torch.bfloat16, 128, 128, (1, 128)),
        (90, torch.bfloat16, 128, 8, (2, 16)),
        (90, torch.bfloat16, 128, 3, (5, 16)),
        (90, torch.bfloat16, 256, 16, (1, 16)),
        (90, torch.float32, 128, 16, (1, 16)),
        (80, torch.bfloat16, 128, 16, (1, 16)),
        (120, torch.bfloat16, 128, 16, (1, 16)),
        (80, torch.bfloat16, 128, 24, (1, 32)),
    ],
)
def test_tiles_are_as_wide_as_the_gpu_multiplies(arch, dtype, dim, group, tile):
    from tinyonn_kernels._tune import compiled_for
    from tinyonn_kernels.nsa.block_lists import tile_of

    found = []
    query = torch.empty(1, 8, group, dim, dtype=dtype, device="meta")
    compiled_for(arch, {"": lambda: found.append(tile_of(query, group))})[""]()
    assert found == [tile]
