"""Sorts pairs (token, slot) by expert on the device, and cuts each expert's pairs into tiles, the rows of one matrix product.

    rank[p]    pairs before p in its chunk that name the same expert
    base[c, e] pairs of expert e in chunks before c
    place[p] = offsets[e] + base[c, e] + rank[p]

P = N * K pairs of N tokens with K slots each, E experts. The algorithm is a counting sort: it ranks the pairs of a chunk by comparing them
with each other, scans over chunks, scans over experts, then writes each pair to its place. Without atomics, the order within an expert is
by token, then slot, and every run gives the same bits. An index outside 0 … E - 1 is an unused slot without a place. All sizes depend on
shapes alone, so the host does not wait for the device; surplus tiles have the expert -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # pairs that a program compares at once, 32 * 32; more of them take many registers
LEAST_CHUNK, MOST_CHUNK = 128, 1024  # the work is P * chunk comparisons and P / chunk * E counts
FEW_CHUNKS = 1024
MAX_PAIRS = 1 << 30  # places are 32-bit to keep the lists small


@triton.jit
def load_experts(index_ptr, pair, inside, num_experts):
    """Experts of pairs, int32, in the shape of `pair`; -1 for an unused slot."""
    expert = tl.load(index_ptr + pair, mask=inside, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1).to(tl.int32)


@triton.jit
def _rank_pairs_kernel(index_ptr, rank_ptr, counts_ptr, num_pairs, num_experts, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    # One program owns BLOCK pairs. The last pair of an expert in a chunk holds their number.
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = load_experts(index_ptr, pair, pair < num_pairs, num_experts)
    chunk = tl.program_id(0) * BLOCK // CHUNK
    rank = tl.zeros((BLOCK,), tl.int32)
    after = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        other = chunk * CHUNK + start + tl.arange(0, BLOCK)
        same = expert[:, None] == load_experts(index_ptr, other, other < num_pairs, num_experts)[None, :]
        rank += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
        after += tl.sum((same & (other[None, :] > pair[:, None])).to(tl.int32), axis=1)
    used = expert >= 0
    tl.store(rank_ptr + pair, rank, mask=used)
    last = used & (after == 0)
    tl.store(counts_ptr + chunk.to(tl.int64) * num_experts + expert, rank + 1, mask=last)


@triton.jit
def _scan_chunks_kernel(counts_ptr, sizes_ptr, num_chunks, num_experts, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):
    # One program owns EXPERTS experts and replaces their counts by sums over the preceding chunks.
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, num_chunks, CHUNKS):
        chunk = (start + tl.arange(0, CHUNKS)).to(tl.int64)
        place = counts_ptr + chunk[:, None] * num_experts + expert[None, :]
        mask = (chunk < num_chunks)[:, None] & (expert < num_experts)[None, :]
        counts = tl.load(place, mask=mask, other=0)
        tl.store(place, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(sizes_ptr + expert, total, mask=expert < num_experts)


@triton.jit
def _expert_offsets_kernel(sizes_ptr, offsets_ptr, tiles_ptr, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    # A single program computes where each expert's pairs and tiles begin, followed by the totals.
    pairs = tl.zeros((), tl.int32)
    tiles = tl.zeros((), tl.int32)
    for start in range(0, num_experts, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        mask = expert < num_experts
        size = tl.load(sizes_ptr + expert, mask=mask, other=0)
        own = (size + (ROWS - 1)) // ROWS
        tl.store(offsets_ptr + expert, pairs + tl.cumsum(size, axis=0) - size, mask=mask)
        tl.store(tiles_ptr + expert, tiles + tl.cumsum(own, axis=0) - own, mask=mask)
        pairs += tl.sum(size, axis=0)
        tiles += tl.sum(own, axis=0)
    tl.store(offsets_ptr + num_experts, pairs)
    tl.store(tiles_ptr + num_experts, tiles)


@triton.jit
def _fill_pairs_kernel(
    index_ptr,
    rank_ptr,
    base_ptr,
    offsets_ptr,
    tiles_ptr,
    slots_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program owns LANES pairs, and LANES tiles, and finds their experts by bisection.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    expert = load_experts(index_ptr, lane, lane < num_pairs, num_experts)
    used = expert >= 0
    base = tl.load(base_ptr + (lane // CHUNK).to(tl.int64) * num_experts + expert, mask=used, other=0)
    place = tl.load(offsets_ptr + expert, mask=used, other=0) + base + tl.load(rank_ptr + lane, mask=used, other=0)
    tl.store(slots_ptr + place, lane, mask=used)

    low = tl.zeros((LANES,), tl.int32)
    high = low + num_experts
    for _ in range(STEPS):
        middle = (low + high) // 2
        found = tl.load(tiles_ptr + middle) <= lane
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle)
    real = lane < tl.load(tiles_ptr + num_experts)
    row = tl.load(offsets_ptr + low) + (lane - tl.load(tiles_ptr + low)) * ROWS
    inside = lane < num_tiles
    tl.store(tile_expert_ptr + lane, tl.where(real, low, -1), mask=inside)
    tl.store(tile_row_ptr + lane, row, mask=inside & real)


class SortedPairs(NamedTuple):
    """Pairs sorted by expert, in places 0 … L - 1, where L <= P is the number of used pairs.

    Attributes:
        slots: (P,) int32, the pair token * K + slot in each place; undefined after the last.
        offsets: (E + 1,) int32, first place of each expert.
        tile_expert: (tiles,) int32, expert of each tile of `rows` places; -1 after the last tile.
        tile_row: (tiles,) int32, first place of each tile.
        rows: places per tile; the last tile of an expert may use fewer.
    """

    slots: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    rows: int


def sort_pairs(top_k_index: Tensor, num_experts: int, rows: int) -> SortedPairs:
    """Four launches for any number of experts: over blocks of pairs, experts, a single program, and blocks of pairs and tiles."""
    index, device = top_k_index.reshape(-1).contiguous(), top_k_index.device
    num_pairs = index.numel()
    if num_pairs >= MAX_PAIRS:
        raise ValueError(f"top_k_index must have fewer than {MAX_PAIRS} slots with impl='triton', got {num_pairs}.")
    num_tiles = num_pairs // rows + min(num_experts, num_pairs)
    chunk = min(MOST_CHUNK, max(LEAST_CHUNK, triton.next_power_of_2(max(num_experts // 8, num_pairs // FEW_CHUNKS))))
    num_chunks = triton.cdiv(num_pairs, chunk)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    counts = torch.zeros((num_chunks, num_experts), dtype=torch.int32, device=device)
    rank, sizes, tiles = integers(num_pairs), integers(num_experts), integers(num_experts + 1)
    pairs = SortedPairs(integers(num_pairs), integers(num_experts + 1), integers(num_tiles), integers(num_tiles), rows)
    _rank_pairs_kernel[(triton.cdiv(num_pairs, BLOCK),)](
        index, rank, counts, num_pairs, num_experts, CHUNK=chunk, BLOCK=BLOCK, num_warps=4
    )  # fmt: skip
    _scan_chunks_kernel[(triton.cdiv(num_experts, 8),)](counts, sizes, num_chunks, num_experts, CHUNKS=256, EXPERTS=8, num_warps=4)
    _expert_offsets_kernel[(1,)](sizes, pairs.offsets, tiles, num_experts, ROWS=rows, EXPERTS=1024, num_warps=4)
    _fill_pairs_kernel[(triton.cdiv(max(num_pairs, num_tiles), 256),)](
        index,
        rank,
        counts,
        pairs.offsets,
        tiles,
        pairs.slots,
        pairs.tile_expert,
        pairs.tile_row,
        num_pairs,
        num_experts,
        num_tiles,
        CHUNK=chunk,
        ROWS=rows,
        STEPS=max(1, (num_experts - 1).bit_length()),
        LANES=256,
        num_warps=4,
    )
    return pairs
