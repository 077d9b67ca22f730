"""Lists of key blocks, regrouped: the union of the lists of neighbouring queries, and the queries that list each block.

Query-outer kernels combine neighbouring queries in one tile: of 16 rows, the least that the matrix unit takes, or of 64 rows, which four
warps of an H100 multiply together. The tile iterates over the union of their lists, which is at most as long as the lists together: a block
that several of them list is read once. Blocks are identified by their first key row, which is unique across sequences. Key-outer kernels
iterate over the inverse, a stable sort by block number. Both are deterministic and need memory in proportion to the lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tune import architecture
from ._common import FAR, Geometry, bounds_of, has_warpgroups

MATRIX_ROWS = 16  # minimum rows of the matrix unit
WIDE_ROWS = 64  # rows that a warpgroup multiplies together
MANY_SEGMENTS = 1024  # enough programs to fill a GPU; more would need more buffers
MIN_SEGMENT = 256
MAX_ENTRIES = 1 << 31  # places are 32-bit to keep the inverse small


@triton.jit
def _merge_lists_kernel(
    indices_ptr,
    counts_ptr,
    blocks_ptr,
    members_ptr,
    lengths_ptr,
    start_ptr,
    end_ptr,
    num_queries,
    num_tiles,
    num_kv,
    num_slots,
    before,
    stride_cb,
    bounds_strides,
    QUERIES: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program owns TILES tiles of one key/value head. Each step removes the first block in order from all lists that begin with it.
    stride_gb, stride_gt = bounds_strides
    batch = (tl.program_id(1) // num_kv).to(tl.int64)
    head = tl.program_id(1) % num_kv
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    lane = tl.arange(0, LANES)
    token = tile[:, None] * QUERIES + lane[None, :]
    inside = (lane < QUERIES)[None, :] & (token < num_queries)
    start, valid = bounds_of(start_ptr + batch * stride_gb, end_ptr + batch * stride_gb, token + before, inside, stride_gt)
    pair = batch * stride_cb + token.to(tl.int64) * num_kv + head
    count = tl.load(counts_ptr + pair, mask=valid, other=0)
    list_ptr = indices_ptr + pair * num_slots
    slot = tl.zeros((TILES, LANES), tl.int32)
    length = tl.zeros((TILES,), tl.int32)
    place = (batch * num_tiles + tile) * num_kv + head
    first = tl.where(count > 0, start + tl.load(list_ptr, mask=count > 0, other=0) * BLOCK_SIZE, FAR)
    nearest = tl.min(first, axis=1)
    while tl.min(nearest) < FAR:
        found = nearest < FAR
        member = (first == nearest[:, None]) & found[:, None]
        target = place * (QUERIES * num_slots) + length
        tl.store(blocks_ptr + target, nearest, mask=found)
        tl.store(members_ptr + target, tl.sum(member.to(tl.int32) << lane[None, :], axis=1), mask=found)
        length += found.to(tl.int32)
        slot += member.to(tl.int32)
        left = slot < count
        first = tl.where(left, start + tl.load(list_ptr + slot, mask=left, other=0) * BLOCK_SIZE, FAR)
        nearest = tl.min(first, axis=1)
    tl.store(lengths_ptr + place, length, mask=tile < num_tiles)


class Tile(NamedTuple):
    """Shape of a tile of whole groups: neighbouring queries, and rows, a power of 2."""

    queries: int
    rows: int


def tile_of(query: Tensor, group: int) -> Tile:
    """Tile of the query-outer kernels: 64 rows if a warpgroup can multiply them, else 16 or the group.

    Tiles of 64 rows need a GPU with warpgroups, half precision, D ≤ 128 and a G that is a power of 2 of at least 16. Otherwise registers
    run out; small groups have enough queries in 16 rows.

    Args:
        query: (B, T, H, D).
        group: query heads of a key/value head, G.
    """
    wide = group >= MATRIX_ROWS and group & (group - 1) == 0 and query.element_size() == 2 and query.shape[-1] <= 128
    wide = wide and has_warpgroups(architecture(query))
    queries = max(1, (WIDE_ROWS if wide else MATRIX_ROWS) // group)
    return Tile(queries, max(MATRIX_ROWS, triton.next_power_of_2(queries * group)))


class Merged(NamedTuple):
    """Lists of tiles of `queries` neighbouring queries.

    Attributes:
        blocks: (B, tiles, K, queries * S) int32, ascending first key rows; for one query per tile, the lists themselves.
        members: same shape; bit i is set if query i of the tile lists the block.
        lengths: (B, tiles, K) int32, lengths of the lists.
        queries: number of queries per tile.
    """

    blocks: Tensor
    members: Tensor
    lengths: Tensor
    queries: int


def merge_lists(indices: Tensor, counts: Tensor, geometry: Geometry, queries: int, block_size: int) -> Merged:
    """Computes the lists of tiles of so many queries; launched over (tiles / TILES, B * K)."""
    batch, num_queries, num_kv, num_slots = indices.shape
    if queries == 1:
        return Merged(indices, counts, counts, 1)
    num_tiles = triton.cdiv(num_queries, queries)
    lanes = triton.next_power_of_2(queries)
    lengths = torch.empty((batch, num_tiles, num_kv), dtype=torch.int32, device=indices.device)
    blocks, members = (torch.empty((*lengths.shape, queries * num_slots), dtype=torch.int32, device=indices.device) for _ in range(2))
    tiles = 32 // lanes
    _merge_lists_kernel[(triton.cdiv(num_tiles, tiles), batch * num_kv)](
        indices,
        counts,
        blocks,
        members,
        lengths,
        geometry.start,
        geometry.end,
        num_queries,
        num_tiles,
        num_kv,
        num_slots,
        geometry.before,
        counts.stride(0),
        geometry.start.stride(),
        QUERIES=queries,
        LANES=lanes,
        TILES=tiles,
        BLOCK_SIZE=block_size,
        num_warps=1,
    )
    return Merged(blocks, members, lengths, queries)


@triton.jit
def block_at(blocks_ptr, members_ptr, slot, origin, query, inside, QUERIES: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """First key row of the block in a slot of a tile's list, and which rows belong to queries that list this block."""
    first = tl.load(blocks_ptr + slot)
    if QUERIES == 1:
        return origin + first * BLOCK_SIZE, inside
    else:
        return first, inside & (((tl.load(members_ptr + slot) >> query) & 1) > 0)


class Inverse(NamedTuple):
    """Queries that list each block, computed on the device. Blocks are numbered over (batch row, head, block), NB in total.

    Attributes:
        entries: (B * T * K * S,) int64, places in the flattened lists, sorted by block; unused entries come last.
        tokens: same shape, int32, query of each entry.
        offsets: (NB + 1,) int32, first entry of each block.
        segments: (NB + 1,) int32, first segment of each block.
        parts: (NB,) int32, first partial sum of each block.
        block_of: (programs,) int32, block of each segment; NB after the last.
        segment: maximum number of entries per segment.
        num_parts: upper bound on the number of partial sums.
    """

    entries: Tensor
    tokens: Tensor
    offsets: Tensor
    segments: Tensor
    parts: Tensor
    block_of: Tensor
    segment: int
    num_parts: int


def invert_lists(indices: Tensor, counts: Tensor, geometry: Geometry, num_keys: int, block_size: int) -> Inverse:
    """Computes the inverse. Sizes depend on shapes alone, so the host does not wait for the device."""
    batch, num_queries, num_kv, num_slots = indices.shape
    device = indices.device
    rows = slice(geometry.before, geometry.before + num_queries)
    start, end, sequence = geometry.start[:, rows], geometry.end[:, rows], geometry.sequence[:, rows]
    place = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    per_head = -(-num_keys // block_size)
    base = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None] * num_kv + torch.arange(
        num_kv, dtype=torch.int32, device=device
    )
    if geometry.packed:
        # Sequence i has at most len // block_size + 1 blocks, so start // block_size + i makes block numbers unique.
        per_head = num_keys // block_size + geometry.starts.shape[1] + 1
        base = base * per_head + (start // block_size + sequence)[:, :, None]
    else:
        base = base * per_head
    total = batch * num_kv * per_head
    if indices.numel() + total >= MAX_ENTRIES:
        raise ValueError(
            f"indices must have fewer than {MAX_ENTRIES} entries and blocks with impl='triton', got {indices.numel() + total}."
        )
    inside = ((start <= place) & (place < end))[:, :, None]
    slot = torch.arange(num_slots, dtype=torch.int32, device=device)
    listed = slot < torch.where(inside, counts, 0)[..., None]
    number, entries = torch.where(listed, indices + base[..., None], total).flatten().sort(stable=True)
    offsets = torch.searchsorted(number, torch.arange(total + 1, dtype=torch.int32, device=device), out_int32=True)
    segment = max(MIN_SEGMENT, triton.next_power_of_2(triton.cdiv(max(1, indices.numel()), MANY_SEGMENTS)))
    sizes = (offsets.diff() + (segment - 1)) // segment
    segments = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    shared = torch.where(sizes > 1, sizes, 0)
    parts = shared.cumsum(0, dtype=torch.int32) - shared
    programs = total + indices.numel() // segment
    block_of = torch.searchsorted(segments[1:], torch.arange(programs, dtype=torch.int32, device=device), right=True, out_int32=True)
    tokens = (entries // (num_slots * num_kv) % num_queries).int()
    num_parts = 0 if num_queries <= segment else 2 * (indices.numel() // segment)
    return Inverse(entries, tokens, offsets, segments, parts, block_of, segment, num_parts)
