"""What each kernel must do at a launch, from first principles: products, steps of its loops, and bytes. `kernel_report.py` uses it.

Numbers are those of one launch. Attention is causal, of one sequence per row without padding, and every list of blocks is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyonn.testing.triton import Build

FORCED = 3  # blocks that every query lists
# Length of the union of the lists of neighbouring queries, over these lists together: `list_overlap.py`, for 4 and 8 blocks a query, prose
# and code. The goal's lists of 16 blocks are thought to overlap as much.
UNION = {1: 1.0, 2: 0.55, 4: 0.30}

_of_text = False


@contextmanager
def lists_of_text() -> Iterator[None]:
    """Within this context, neighbouring queries share as many blocks as in text; elsewhere, they share the forced ones alone."""
    global _of_text
    _of_text = True
    try:
        yield
    finally:
        _of_text = False


@dataclass(frozen=True)
class Work:
    """Of one launch.

    Attributes:
        needed: floating-point operations of the matrix products that the mathematics needs.
        steps: how often all programs together run each loop that has matrix instructions, in the order of the code. Other loops count as
            the matrix loop before them. Without such loops, steps of the whole kernel: its number of programs.
        tile: floating-point operations of the products of one step, in the same order.
        dram: bytes that are read or written at least once.
        cached: bytes that all programs together load from L2, and write.
        programs: number of programs that have work; None for all.
        before: how often all programs together run loops without products before the first loop with them; None for as often as that.
    """

    needed: float
    steps: tuple[float, ...]
    tile: tuple[float, ...]
    dram: float
    cached: float
    programs: float | None = None
    before: float | None = None


class Launch:
    """A build with short names for what its work depends on."""

    def __init__(self, build: Build) -> None:
        self.name, self.grid = build.kernel.__name__, build.grid
        self.arguments = build.arguments
        self.programs = int(np.prod(build.grid))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    def bytes_of(self, *names: str) -> float:
        return float(sum(self.arguments[name].numel() * self.arguments[name].element_size() for name in names))

    def item(self, name: str) -> int:
        return int(self.arguments[name].element_size())


def _intervals(one: Launch) -> tuple[np.ndarray, np.ndarray]:
    """First key and end of the keys of each query of an interval kernel."""
    place = np.arange(one.num_rows // one.GROUP) + one.before
    if one.COMPRESSED:
        return np.zeros_like(place), (place + 1) // one.reach
    return np.maximum(place - one.reach + 1, 0), place + 1


def _query_tiles(one: Launch) -> tuple[float, float]:
    """Steps of all programs over the keys of their rows, and keys that queries see, times heads."""
    low, high = _intervals(one)
    first = np.arange(one.grid[0]) * one.ROWS
    last = np.minimum(first + one.ROWS, one.num_rows) - 1
    spans = high[last // one.GROUP] - low[first // one.GROUP]
    return float(np.ceil(spans / one.KEYS).sum() * one.grid[1]), float((high - low).sum() * one.GROUP * one.grid[1])


def _whole_tiles(one: Launch) -> float:
    """Steps of all programs whose keys all rows see."""
    low, high = _intervals(one)
    first = np.arange(one.grid[0]) * one.ROWS
    head, tail = first // one.GROUP, (np.minimum(first + one.ROWS, one.num_rows) - 1) // one.GROUP
    skipped = np.ceil((low[tail] - low[head]) / one.KEYS)
    return float(np.maximum((high[head] - low[head]) // one.KEYS - skipped, 0).sum() * one.grid[1])


def interval_fwd(one: Launch) -> Work:
    steps, seen = _query_tiles(one)
    whole, tile = _whole_tiles(one), 4 * one.ROWS * one.KEYS * one.WIDTH
    width, size = one.WIDTH, one.item("q_ptr")
    out = one.bytes_of("out_ptr") * (2 if one.ACCUMULATE else 1)
    return Work(
        needed=4 * seen * one.HEAD_DIM,
        steps=(whole, steps - whole),
        tile=(tile, tile),
        dram=one.bytes_of("q_ptr", "k_ptr", "v_ptr", "lse_ptr") + out,
        cached=steps * 2 * one.KEYS * width * size + one.bytes_of("q_ptr") + out,
    )


def interval_dq(one: Launch) -> Work:
    steps, seen = _query_tiles(one)
    whole = _whole_tiles(one)
    width, size = one.WIDTH, one.item("q_ptr")
    tile = 2 * one.ROWS * one.KEYS * width
    out = one.bytes_of("dq_ptr") + (one.bytes_of("added_ptr") if one.HAS_ADDED else 0)
    rows = one.bytes_of("q_ptr", "do_ptr") + out
    return Work(
        needed=6 * seen * one.HEAD_DIM,
        steps=(whole, steps - whole, whole, steps - whole),
        tile=(2 * tile, 2 * tile, 3 * tile, 3 * tile),
        dram=one.bytes_of("k_ptr", "v_ptr", "lse_ptr", "product_ptr") + rows,
        cached=2 * steps * 2 * one.KEYS * width * size + rows,
    )


def interval_dkv(one: Launch) -> Work:
    low, high = _intervals(one)
    n0 = np.arange(one.grid[0]) * one.KEYS
    last = np.minimum(n0 + one.KEYS, one.num_keys) - 1
    tokens = one.num_rows // one.GROUP
    first = (n0 + 1) * one.reach - 1 if one.COMPRESSED else n0
    stop = np.full_like(first, tokens + one.before) if one.COMPRESSED else np.minimum(last + one.reach, tokens + one.before)
    rows = np.maximum(stop - np.maximum(first, one.before), 0) * one.GROUP
    splits, heads = one.grid[1], one.grid[2]
    part = np.ceil(np.ceil(rows / splits) / one.ROWS)
    steps = float(part.sum() * splits * heads)
    seen = float((high - low).sum() * one.GROUP * heads)
    all_see = (last + 1) * one.reach - 1 if one.COMPRESSED else last  # first query that sees all keys of the tile
    beyond = stop if one.COMPRESSED else np.minimum(n0 + one.reach, stop)
    whole = float((np.maximum(beyond - np.maximum(all_see, one.before), 0) * one.GROUP // one.ROWS).sum() * heads)
    tile = 8 * one.ROWS * one.KEYS * one.WIDTH
    return Work(
        needed=8 * seen * one.HEAD_DIM,
        steps=(whole, steps - whole),
        tile=(tile, tile),
        dram=one.bytes_of("q_ptr", "do_ptr", "k_ptr", "v_ptr", "dk_ptr", "dv_ptr", "lse_ptr", "product_ptr"),
        cached=steps * 2 * one.ROWS * one.WIDTH * one.item("q_ptr")
        + one.bytes_of("k_ptr", "v_ptr") * splits
        + one.bytes_of("dk_ptr", "dv_ptr"),
    )


def _selection_tiles(one: Launch) -> tuple[float, float]:
    """Steps of all tiles over the blocks, and (query, compressed key) pairs times heads."""
    last = np.minimum(np.arange(0, one.num_queries, one.QUERIES) + one.QUERIES, one.num_queries) - 1 + one.before
    heads = one.num_tiles // len(last)
    steps = float(np.ceil((last // one.BLOCK_SIZE + 1) / one.BLOCKS).sum() * heads)
    seen = (np.arange(one.num_queries) + one.before + 1) // (one.BLOCK_SIZE // one.RATIO)
    return steps, float(seen.sum() * one.GROUP * heads)


def _selection(one: Launch, products: int, own: float) -> Work:
    """Work of a kernel over all blocks of each query, with this number of products per step, that moves `own` bytes beside the keys."""
    steps, seen = _selection_tiles(one)
    rows, keys = one.QUERIES * one.PADDED, one.BLOCKS * one.RATIO
    scratch = 4 * steps * one.QUERIES * one.BLOCKS * 4
    return Work(
        needed=2 * products * seen * one.HEAD_DIM,
        steps=(steps,),
        tile=(2 * products * rows * keys * one.WIDTH,),
        dram=own + one.bytes_of("k_ptr"),
        cached=steps * keys * one.WIDTH * one.item("k_ptr") + own + scratch,
    )


def select_fwd(one: Launch) -> Work:
    return _selection(one, 1, one.bytes_of("q_ptr", "lse_ptr", "indices_ptr", "bias_ptr", "counts_ptr", "soft_ptr"))


def select_dq(one: Launch) -> Work:
    own = one.bytes_of("q_ptr", "lse_ptr", "indices_ptr", "dbias_ptr", "counts_ptr", "dsoft_ptr", "dthreshold_ptr", "dlse_ptr")
    return _selection(one, 2, own + one.bytes_of("dq_ptr") * (2 if one.ACCUMULATE else 1))


def select_dk(one: Launch) -> Work:
    compress = one.BLOCK_SIZE // one.RATIO
    tokens = one.num_queries + one.before
    first = np.maximum(np.arange(one.grid[0]) * one.BLOCKS * one.BLOCK_SIZE + compress - 1, one.before)
    splits, heads = one.grid[1:]
    part = np.ceil(np.maximum(tokens - first, 0) / (splits * one.QUERIES))
    steps = float(part.sum() * splits * heads)
    seen = float(((np.arange(one.num_queries) + one.before + 1) // compress).sum() * one.GROUP * heads)
    rows, keys = one.QUERIES * one.PADDED, one.BLOCKS * one.RATIO
    row_bytes = rows * (one.WIDTH * one.item("q_ptr") + 4) + one.QUERIES * (5 * one.BLOCKS + 2 * one.num_slots) * 4  # and scratch, lists
    return Work(
        needed=4 * seen * one.HEAD_DIM,
        steps=(steps,),
        tile=(4 * rows * keys * one.WIDTH,),
        dram=one.bytes_of("q_ptr", "k_ptr", "lse_ptr", "indices_ptr", "dbias_ptr", "dk_ptr"),
        cached=steps * (row_bytes + keys * one.WIDTH * one.item("k_ptr")) + one.bytes_of("dk_ptr"),
    )


def _listed(one: Launch) -> tuple[float, float]:
    """Steps of all programs over full lists, and (row, key) pairs of the lists."""
    lists = one.num_queries * one.grid[1] * one.num_slots
    union = FORCED + one.QUERIES * (one.num_slots - FORCED)
    if _of_text and one.QUERIES in UNION:
        union = UNION[one.QUERIES] * one.QUERIES * one.num_slots
    blocks = one.grid[0] * one.grid[1] * union
    return blocks * (one.BLOCK_SIZE // one.KEYS), lists * one.BLOCK_SIZE * one.GROUP


def block_sparse_fwd(one: Launch) -> Work:
    steps, seen = _listed(one)
    own = one.bytes_of("q_ptr", "blocks_ptr", "bias_ptr", "out_ptr", "lse_ptr")
    if one.HAS_SUM:
        own += one.bytes_of("added_ptr", "sum_ptr", "weight_ptr")
    return Work(
        needed=4 * seen * one.HEAD_DIM,
        steps=(steps,),
        tile=(4 * one.ROWS * one.KEYS * one.WIDTH,),
        dram=own + one.bytes_of("k_ptr", "v_ptr"),
        cached=steps * 2 * one.KEYS * one.WIDTH * one.item("k_ptr") + own,
    )


def block_sparse_dq(one: Launch) -> Work:
    steps, seen = _listed(one)
    own = one.bytes_of("q_ptr", "do_ptr", "blocks_ptr", "bias_ptr", "dbias_ptr", "lse_ptr", "shift_ptr", "dq_ptr")
    if one.HAS_OUT:
        own += one.bytes_of("out_ptr", "product_ptr")
    return Work(
        needed=6 * seen * one.HEAD_DIM,
        steps=(steps,),
        tile=(6 * one.ROWS * one.KEYS * one.WIDTH,),
        dram=own + one.bytes_of("k_ptr", "v_ptr"),
        cached=steps * 2 * one.KEYS * one.WIDTH * one.item("k_ptr") + own,
    )


def block_sparse_dkv(one: Launch) -> Work:
    entries = one.entries_ptr.numel()
    parts = one.BLOCK_SIZE // one.KEYS
    steps = parts * np.ceil(entries * one.GROUP / one.ROWS)
    size = one.item("q_ptr")
    return Work(
        needed=8 * entries * one.GROUP * one.BLOCK_SIZE * one.HEAD_DIM,
        steps=(steps,),
        tile=(8 * one.ROWS * one.KEYS * one.WIDTH,),
        dram=one.bytes_of("q_ptr", "do_ptr", "k_ptr", "v_ptr", "dk_ptr", "dv_ptr", "entries_ptr", "tokens_ptr", "bias_ptr"),
        cached=steps * one.ROWS * (2 * one.WIDTH * size + 3 * 4) + 2 * one.bytes_of("dk_ptr", "dv_ptr"),
    )


def _pairs(one: Launch) -> int:
    return int(one.slots_ptr.numel())


def _gathered(one: Launch, width: int, passes: int, name: str) -> float:
    """Bytes of the rows that all pairs load."""
    return float(_pairs(one) * width * passes * one.item(name))


def expert_gate_up(one: Launch) -> Work:
    both = 2 if one.GATED else 1
    columns = -(-one.NEURONS // one.COLUMNS)
    tiles = _pairs(one) / one.ROWS * columns
    steps = tiles * -(-one.FEATURES // one.DEPTH)
    written = one.bytes_of("pre_ptr", "h_ptr")
    return Work(
        needed=2 * _pairs(one) * both * one.NEURONS * one.FEATURES,
        steps=(steps,),
        tile=(2 * both * one.ROWS * one.COLUMNS * one.DEPTH,),
        dram=one.bytes_of("x_ptr", "w_ptr") + written,
        cached=_gathered(one, one.FEATURES, columns, "x_ptr")
        + one.bytes_of("w_ptr") * max(1, tiles / columns / one.w_ptr.shape[0])
        + written,
        programs=tiles,
    )


def expert_rows(one: Launch) -> Work:
    columns = -(-one.FEATURES // one.COLUMNS)
    tiles = _pairs(one) / one.ROWS * columns
    steps = tiles * -(-one.INNER // one.DEPTH)
    written = one.bytes_of("rows_ptr")
    return Work(
        needed=2 * _pairs(one) * one.INNER * one.FEATURES,
        steps=(steps,),
        tile=(2 * one.ROWS * one.COLUMNS * one.DEPTH,),
        dram=one.bytes_of("source_ptr", "m_ptr") + written,
        cached=_gathered(one, one.INNER, columns, "source_ptr")
        + one.bytes_of("m_ptr") * max(1, tiles / columns / one.m_ptr.shape[0])
        + written,
        programs=tiles,
    )


def expert_outer(one: Launch) -> Work:
    if one.LATER:  # no expert has so many pairs that it has later parts
        return Work(0, (0,), (0,), 0, 0)
    experts = one.out_ptr.shape[0]
    lines, columns = -(-one.INNER // one.LINES), -(-one.FEATURES // one.COLUMNS)
    steps = experts * lines * columns * np.ceil(_pairs(one) / experts / one.DEPTH)
    return Work(
        needed=2 * _pairs(one) * one.INNER * one.FEATURES,
        steps=(steps,),
        tile=(2 * one.LINES * one.COLUMNS * one.DEPTH,),
        dram=one.bytes_of("left_ptr", "right_ptr", "out_ptr"),
        cached=_gathered(one, one.INNER, columns, "left_ptr") + _gathered(one, one.FEATURES, lines, "right_ptr") + one.bytes_of("out_ptr"),
        before=0,
    )


def expert_grad_pre(one: Launch) -> Work:
    blocks = -(-one.NEURONS // one.COLUMNS)
    tiles = _pairs(one) / one.ROWS
    steps = tiles * blocks * -(-one.FEATURES // one.DEPTH)
    rest = one.bytes_of("pre_ptr", "grad_pre_ptr", "weighed_h_ptr")
    return Work(
        needed=2 * _pairs(one) * one.NEURONS * one.FEATURES,
        steps=(steps,),
        tile=(2 * one.ROWS * one.COLUMNS * one.DEPTH,),
        dram=one.bytes_of("grad_ptr", "down_ptr") + rest,
        cached=_gathered(one, one.FEATURES, blocks, "grad_ptr") + one.bytes_of("down_ptr") * max(1, tiles / one.down_ptr.shape[0]) + rest,
        programs=tiles,
    )


def attention_stats(one: Launch) -> Work:
    last = np.minimum((np.arange(one.grid[0]) + 1) * one.ROWS, one.num_rows) - 1
    steps = float(np.ceil((last // one.GROUP + one.before + 1) / one.KEYS).sum() * one.grid[1])
    seen = float((np.arange(one.num_rows // one.GROUP) + one.before + 1).sum() * one.GROUP * one.grid[1])
    own = one.bytes_of("q_ptr", "entropy_ptr", "mass_ptr")
    return Work(
        needed=2 * seen * one.HEAD_DIM,
        steps=(steps,),
        tile=(2 * one.ROWS * one.KEYS * one.WIDTH,),
        dram=own + one.bytes_of("k_ptr"),
        cached=steps * one.KEYS * one.WIDTH * one.item("k_ptr") + own,
    )


def moves(*names: str, steps: Callable[[Launch], float] = lambda one: one.programs) -> Callable[[Launch], Work]:
    """Work of a kernel without matrix products, which reads or writes each of these tensors once."""
    return lambda one: Work(0, (steps(one),), (0,), one.bytes_of(*names), one.bytes_of(*names))


_FUNCTIONS = (
    interval_fwd,
    interval_dq,
    interval_dkv,
    select_fwd,
    select_dq,
    select_dk,
    block_sparse_fwd,
    block_sparse_dq,
    block_sparse_dkv,
    expert_gate_up,
    expert_rows,
    expert_outer,
    expert_grad_pre,
    attention_stats,
)
WORK: dict[str, Callable[[Launch], Work]] = {f"_{function.__name__}_kernel": function for function in _FUNCTIONS} | {
    "_merge_lists_kernel": moves("indices_ptr", "blocks_ptr", "members_ptr", steps=lambda one: one.programs * one.QUERIES * one.num_slots),
    "_block_sparse_reduce_kernel": moves("partial_ptr", "dk_ptr", "dv_ptr", "dk_ptr", "dv_ptr"),
    "_combine_slots_kernel": moves("rows_ptr", "index_ptr", "out_ptr", steps=lambda one: one.programs * one.num_slots),
    "_rank_pairs_kernel": moves("index_ptr"),
    "_scan_chunks_kernel": moves("counts_ptr"),
    "_expert_offsets_kernel": moves("offsets_ptr"),
    "_fill_pairs_kernel": moves("slots_ptr"),
    "_block_norms_kernel": moves("x_ptr", "out_ptr"),
    "_token_grad_norms_kernel": moves("inputs_ptr", "grad_ptr", "out_ptr", steps=lambda one: one.programs * one.num_blocks / one.BLOCKS),
    "_integrate_sps_kernel": moves("a_ptr", "g_ptr", "partial_ptr", steps=lambda one: one.programs * one.tokens_per_chunk),
}
