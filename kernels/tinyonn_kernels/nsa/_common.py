"""Shared by the kernels of DynNSA: bounds of sequences, visible keys of a query, tile sizes.

    place g    position of a query among the key rows: its own row + `before`
    [start, end)   key rows of its sequence; a query outside all sequences is padding and sees no keys
    window     keys  max(start, g - window + 1) … g
    compressed keys  f … f + (g - start + 1) // compress_size - 1,  f = start // compress_size for packed sequences, else 0

The last two are both one interval of key rows per query, so they share a set of kernels. A row of a tile is a (query, head of the group)
pair: row = query * GROUP + head. The host never reads the bounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 1 << 30
MAX_GRID = 65535  # CUDA's limit on the second and third dimension
LOG2E = math.log2(math.e)
FAR = tl.constexpr(2147483647)  # greater than every key row
BOTTOM = tl.constexpr(-1e30)  # finite initial maximum, so that differences are finite


class Geometry(NamedTuple):
    """Sequences of a batch, on the device.

    Attributes:
        start, end: (B, Tk) int32, bounds of the sequence at each key row; stride 0 along Tk for one sequence per row.
        before: number of key rows before that of the first query.
        packed: whether a row may hold several sequences.
        sequence: (B, Tk) int32, index of the sequence within its row.
        starts, ends: (B, sequences) int32, bounds of each sequence.
    """

    start: Tensor
    end: Tensor
    before: int
    packed: bool
    sequence: Tensor
    starts: Tensor
    ends: Tensor

    def of_chunk(self, begin: int) -> Geometry:
        """Geometry of the queries from `begin` on."""
        return self._replace(before=self.before + begin)


def geometry_of(query: Tensor, num_keys: int, cu_seqlens: Tensor | None, key_start: Tensor | None, key_end: Tensor | None) -> Geometry:
    batch, num_queries = query.shape[:2]
    device = query.device
    before = num_keys - num_queries
    if cu_seqlens is not None and cu_seqlens.shape[0] > 1:
        rows = torch.arange(num_keys, dtype=torch.int32, device=device)
        last = cu_seqlens.shape[0] - 2
        sequence = (torch.searchsorted(cu_seqlens.contiguous(), rows, right=True) - 1).clamp_(0, last)
        start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        return Geometry(start[None], end[None], before, True, sequence.int()[None], cu_seqlens[None, :-1], cu_seqlens[None, 1:])
    if cu_seqlens is not None:
        key_end = torch.zeros(batch, dtype=torch.int32, device=device)
    if key_start is None:
        key_start = torch.zeros(batch, dtype=torch.int32, device=device)
    if key_end is None:
        key_end = torch.full((batch,), num_keys, dtype=torch.int32, device=device)
    shape = (batch, max(num_keys, 1))
    starts, ends = key_start[:, None], key_end[:, None]
    sequence = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(shape)
    return Geometry(starts.expand(shape), ends.expand(shape), before, False, sequence, starts, ends)


def count_heads(query: Tensor, num_kv: int, geometry: Geometry) -> int:
    """B * K, the second or third dimension of a grid. Offsets are 64-bit; rows of tiles, up to twice keys times group, are 32-bit."""
    rows, pairs = geometry.start.shape[1] * (query.shape[2] // num_kv), query.shape[0] * num_kv
    if rows >= MAX_ROWS:
        raise ValueError(f"key must have fewer than {MAX_ROWS} rows times query heads of a group with impl='triton', got {rows}.")
    if pairs > MAX_GRID:
        raise ValueError(f"key must have at most {MAX_GRID} heads in all batch rows with impl='triton', got {pairs}.")
    return pairs


def unit_stride(x: Tensor) -> Tensor:
    """Copies a tensor whose last stride is not 1; kernels accept any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_measured(arch: int) -> bool:
    """Whether configurations for D = 128 were timed on such a GPU, so that no trial is needed: H100 and H200."""
    return 90 <= arch < 100


def has_warpgroups(arch: int) -> bool:
    """Whether four warps multiply together, on a GPU with over 200 KiB of shared memory: H100 and B200, but not RTX 50 (sm_120)."""
    return 90 <= arch < 120


def width_of(dim: int) -> int:
    """Columns of a tile that holds `dim` features."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def bounds_of(start_ptr, end_ptr, place, inside, stride_gt):
    """First key row of the sequence at each `place`, and whether the query there belongs to a sequence."""
    start = tl.load(start_ptr + place * stride_gt, mask=inside, other=0)
    end = tl.load(end_ptr + place * stride_gt, mask=inside, other=0)
    return start, inside & (start <= place) & (place < end)


@triton.jit
def interval_of(start, place, valid, reach, COMPRESSED: tl.constexpr, PACKED: tl.constexpr):
    """Key rows [low, high) that each query sees; empty for padding."""
    if COMPRESSED:
        low = start * 0
        if PACKED:
            low = start // reach
        high = low + (place - start + 1) // reach
    else:
        low = tl.maximum(start, place - reach + 1)
        high = place + 1
    return low, tl.where(valid, high, low)


@triton.jit
def load_rows(base_ptr, row_offset, inside, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Loads (rows, WIDTH) values; features from HEAD_DIM on are 0. A row begins at element row_offset * stride, in int64."""
    feature = tl.arange(0, WIDTH)
    mask = inside[:, None] & (feature < HEAD_DIM)[None, :]
    return tl.load(base_ptr + (row_offset * stride)[:, None] + feature[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(base_ptr, n, last, stride, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Loads the rows `n` of keys or values; with MASKED, those from `last` on are 0."""
    if MASKED or HEAD_DIM < WIDTH:
        return load_rows(base_ptr, n.to(tl.int64), n < last, stride, HEAD_DIM, WIDTH)
    else:
        return tl.load(base_ptr + (n.to(tl.int64) * stride)[:, None] + tl.arange(0, WIDTH)[None, :])


@triton.jit
def whole_tiles(low, high, seen, KEYS: tl.constexpr):
    """First key and end of what any row sees, and of its tiles that all rows see wholly; only rows that see keys count.

    All are 0 where no row sees a key: a pipelined loop computes addresses of several steps before it begins, and FAR + KEYS is negative.
    """
    last = tl.max(tl.where(seen, high, 0))
    first = tl.minimum(tl.min(tl.where(seen, low, FAR)), last)
    left = tl.cdiv(tl.max(tl.where(seen, low, 0)) - first, KEYS)
    right = (tl.min(tl.where(seen, high, FAR)) - first) // KEYS
    begin = first + left * KEYS
    return first, last, begin, tl.maximum(begin, tl.minimum(first + right * KEYS, last))


@triton.jit
def store_rows(base_ptr, row_offset, inside, values, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Stores (rows, WIDTH) values, or with ACCUMULATE adds them to those in memory. A row begins at element row_offset, in int64."""
    feature = tl.arange(0, WIDTH)
    mask = inside[:, None] & (feature < HEAD_DIM)[None, :]
    target = base_ptr + row_offset[:, None] + feature[None, :]
    if ACCUMULATE:
        values += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, values, mask=mask)


@triton.jit
def store_sum(
    base_ptr, row_offset, added_ptr, added_offset, inside, values, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HAS_ADDED: tl.constexpr
):
    """Stores (rows, WIDTH) values, with HAS_ADDED plus those at added_ptr. A row begins at element row_offset, in int64."""
    feature = tl.arange(0, WIDTH)
    mask = inside[:, None] & (feature < HEAD_DIM)[None, :]
    if HAS_ADDED:
        values += tl.load(added_ptr + added_offset[:, None] + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(base_ptr + row_offset[:, None] + feature[None, :], values, mask=mask)


@triton.jit
def join_sink(lse, sinks_ptr, query_head, inside):
    """(rows,) log of the sum of e^lse and e^sink, and the factor that this makes of a result without the sink."""
    sink = tl.load(sinks_ptr + query_head, mask=inside, other=0.0).to(tl.float32)
    top = tl.maximum(lse, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    joined = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
    return joined, tl.exp(lse - tl.where(joined == float("-inf"), 0.0, joined))


@triton.jit
def load_weight(weight_ptr, offset, inside, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS,) float32 factors of the result; 1 if there are no weights."""
    if HAS_WEIGHT:
        return tl.load(weight_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.full((ROWS,), 1.0, tl.float32)


def cap_log2(softcap: float | None) -> float:
    """CAP of a launch: the cap of scores in base 2; 0 for none."""
    return 0.0 if softcap is None else softcap * LOG2E


@triton.jit
def tanh(x):
    """Within a relative error of 3e-7 in float32. The form 1 - 2 / (e^2x + 1) would lose digits of a small x."""
    square = x * x
    near = x + x * square * (-0.33333148 + square * (0.13325987 + square * (-0.05305294 + square * 0.01725696)))
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(scores, CAP: tl.constexpr):
    """CAP · tanh(scores / CAP), or the scores where CAP is 0; both in base 2. CAP multiplies the error of tanh."""
    if CAP > 0:
        scores = CAP * tanh(scores / CAP)
    return scores


@triton.jit
def cap_slope(scores, CAP: tl.constexpr):
    """Derivative of `capped`, from its result."""
    x = scores / CAP
    return 1.0 - x * x


@triton.jit
def softmax_step(scores, top, total):
    """One step of an online softmax in base 2: 2^(scores - new top), new top, new total, and the factor that rescales earlier sums."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    keep = tl.exp2(top - new_top)
    p = tl.exp2(scores - new_top[:, None])
    return p, new_top, total * keep + tl.sum(p, axis=1), keep


@triton.jit
def dot(a, b, IEEE: tl.constexpr):
    """Matrix product. IEEE multiplies float32 values in float32 instead of TF32."""
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)
