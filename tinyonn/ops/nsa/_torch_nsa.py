"""The compressed branch and the window in plain torch: rows of queries against the keys they see.

    n queries and m keys of one sequence, H query heads, K key/value heads, G = H / K, D head dim, NB key blocks, S slots of a row

Everything here works on one sequence (`Span`) and one tile of it after another; heads of a group are rows of one matrix product.
Half precision is widened to float32 tile by tile. 0 times NaN is NaN, so a key or value that is not finite is in no product with a query
that does not see it: tiles where it would be are cut into single queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast

ROW_ELEMENTS = 1 << 20  # scores of a chunk of queries, all heads: they stay in the cache


class Span(NamedTuple):
    """One sequence: its batch row, the rows of its queries and keys there, its first compressed key, its first query's position."""

    batch: int
    query_begin: int
    query_end: int
    key_begin: int
    key_end: int
    compressed: int
    first: int

    @property
    def num_queries(self) -> int:
        return self.query_end - self.query_begin

    @property
    def num_keys(self) -> int:
        return self.key_end - self.key_begin


def spans_of(
    query: Tensor, num_keys: int, compress_size: int, cu_seqlens: Tensor | None, key_start: Tensor | None, key_end: Tensor | None
) -> list[Span]:
    """The sequences of a batch, without their padding; reads the bounds' values."""
    batch, num_queries = query.shape[:2]
    if cu_seqlens is not None:
        return [Span(0, begin, end, begin, end, begin // compress_size, 0) for begin, end in pairwise(cu_seqlens.tolist()) if end > begin]
    before = num_keys - num_queries
    starts = [0] * batch if key_start is None else key_start.tolist()
    ends = [num_keys] * batch if key_end is None else key_end.tolist()
    found = []
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first = max(start, before)
        if end > first:
            found.append(Span(row, first - before, end - before, start, end, 0, first - start))
    return found


class Chunk(NamedTuple):
    """Consecutive queries of a span: rows of the batch row, and the first one's position."""

    begin: int
    end: int
    position: int

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.position, self.position + self.end - self.begin, device=device)


class Tile(NamedTuple):
    """A chunk and the keys that its queries see: rows [low, high) of the span's, and which of them each query sees (n, high - low)."""

    chunk: Chunk
    low: int
    high: int
    visible: Tensor

    @property
    def num_queries(self) -> int:
        return self.chunk.end - self.chunk.begin

    @property
    def rows(self) -> slice:
        return slice(self.chunk.begin, self.chunk.end)

    def bias(self, group: int, dtype: torch.dtype) -> Tensor | None:
        """(G * n, high - low), 0 where visible and -inf where not; None where all are."""
        if bool(self.visible.all()):
            return None
        bias = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device).masked_fill_(~self.visible, -math.inf)
        return bias.repeat(group, 1)


def chunks_of(begin: int, end: int, position: int, size: int) -> Iterator[Chunk]:
    for first in range(begin, end, size):
        yield Chunk(first, min(first + size, end), position + first - begin)


def tiles_of(span: Span, size: int, broken: Tensor | None, tile_of: Callable[[Chunk], Tile]) -> Iterator[Tile]:
    """Tiles of `size` queries, of one where a key that some query does not see is `broken` (m,)."""
    for chunk in chunks_of(span.query_begin, span.query_end, span.first, size):
        tile = tile_of(chunk)
        if broken is not None and bool((broken[tile.low : tile.high] & ~tile.visible).any()):
            yield from map(tile_of, chunks_of(*chunk, 1))
        else:
            yield tile


def broken_rows(*tensors: Tensor) -> Tensor | None:
    """(m,) where (K, m, D) hold something that is not finite, or numbers so large that their sum is not; None for nowhere."""
    finite_sums = torch.stack([x.sum(-1) for x in tensors]).isfinite().all(0).all(0)
    return None if bool(finite_sums.all()) else ~finite_sums


def grouped_rows(x: Tensor, num_kv: int, dtype: torch.dtype) -> Tensor:
    """(n, H, D) -> (K, G * n, D), a group's heads one after another."""
    n, heads, dim = x.shape
    return x.to(dtype).reshape(n, num_kv, heads // num_kv, dim).permute(1, 2, 0, 3).reshape(num_kv, heads // num_kv * n, dim)


def grouped_numbers(x: Tensor, rows: tuple[int, slice], num_kv: int, dtype: torch.dtype) -> Tensor:
    """Rows of (B, T, H) as (K, G * n)."""
    return grouped_rows(x[rows].unsqueeze(-1), num_kv, dtype).squeeze(-1)


def ungrouped(x: Tensor, n: int) -> Tensor:
    """(K, G * n, ...) -> (n, H, ...)."""
    return x.unflatten(1, (-1, n)).movedim(2, 0).flatten(1, 2)


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, K, D) -> (K, m, D) contiguous."""
    return x.to(dtype).transpose(0, 1).contiguous()


# ---- rows: a chunk of queries against consecutive keys ----


def row_scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(K, R, D), (K, m, D) -> (K, R, m)."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    return scores if bias is None else scores.add_(bias)


def rows_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over each row: out (K, R, D), lse (K, R), probabilities (K, R, m) but for a factor; 0 and -inf where a row sees nothing."""
    scores = row_scores(q, k, bias, scale)
    shift = finite(scores.amax(-1))
    weights = scores.sub_(shift.unsqueeze(-1)).exp_()
    total = weights.sum(-1)
    out = torch.bmm(weights, v).div_(total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1))
    return out, shift.add_(total.log()), weights


def rows_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v where `weight * out` has the gradient `grad_out`; and (K, R), the product of out and grad_out."""
    probabilities = row_scores(q, k, bias, scale).sub_(finite(lse).unsqueeze(-1)).exp_()
    weighted = grad_out if weight is None else grad_out * weight.unsqueeze(-1)
    grad_v = torch.bmm(probabilities.transpose(1, 2), weighted)
    grad = torch.bmm(grad_out, v.transpose(1, 2))
    product = torch.linalg.vecdot(probabilities, grad)
    grad.sub_(product.unsqueeze(-1))
    if weight is not None:
        grad.mul_(weight.unsqueeze(-1))
    if grad_lse is not None:
        grad.add_(grad_lse.unsqueeze(-1))
    grad = grad.mul_(probabilities).mul_(scale)
    return torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q), grad_v, product


def finite(lse: Tensor) -> Tensor:
    """0 in place of -inf: exp(-inf - 0) is the 0 that a row without a visible key needs."""
    return lse.masked_fill(lse == -math.inf, 0)


# ---- compressed branch ----


def compressed_tiles(span: Span, heads: int, compress_size: int, broken: Tensor | None, device: torch.device) -> Iterator[Tile]:
    """Tiles of compressed keys, from the span's first on; `high` is 0 where no query sees any."""
    most = span.num_keys // compress_size
    ends = torch.arange(1, most + 1, device=device) * compress_size

    def tile_of(chunk: Chunk) -> Tile:
        seen = min((chunk.position + chunk.end - chunk.begin) // compress_size, most)
        return Tile(chunk, 0, seen, ends[:seen] <= chunk.positions(device)[:, None] + 1)

    size = max(16, min(1024, ROW_ELEMENTS // (heads * max(1, most))))
    return tiles_of(span, size, broken, tile_of)


@without_autocast
def compressed_forward(
    query: Tensor, key: Tensor, value: Tensor, spans: list[Span], compress_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H), entropy (B, T, H)."""
    heads, dtype = query.shape[2], statistics_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    entropy = torch.zeros_like(lse)
    for span in spans:
        k, v = compressed_keys(key, span, compress_size, dtype), compressed_keys(value, span, compress_size, dtype)
        for tile in compressed_tiles(span, heads, compress_size, broken_rows(k, v), query.device):
            if tile.high:
                weights = _write_rows(query, k, v, tile, span.batch, scale, out, lse)
                probabilities = weights.div_(weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny))
                entropy[span.batch, tile.rows] = ungrouped(torch.special.entr(probabilities).sum(-1), tile.num_queries)
    return out, lse, entropy


@without_autocast
def compressed_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
    spans: list[Span],
    compress_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in the dtype of computation, where `weight * out` has the gradient `grad_out`; and (B, T, H),
    the product of out and grad_out.
    """
    heads, dtype = query.shape[2], lse.dtype
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    product = torch.zeros_like(lse)
    for span in spans:
        k, v = compressed_keys(key, span, compress_size, dtype), compressed_keys(value, span, compress_size, dtype)
        into = slice(span.compressed, span.compressed + k.shape[1])
        grad_k, grad_v = grad_key[span.batch, into].transpose(0, 1), grad_value[span.batch, into].transpose(0, 1)
        for tile in compressed_tiles(span, heads, compress_size, broken_rows(k, v), query.device):
            if tile.high:
                given = (lse, grad_out, weight, grad_lse)
                _add_gradients(query, k, v, tile, span.batch, scale, given, grad_query, grad_k, grad_v, product)
    return grad_query, grad_key, grad_value, product


def compressed_keys(compressed: Tensor, span: Span, compress_size: int, dtype: torch.dtype) -> Tensor:
    return heads_first(compressed[span.batch, span.compressed : span.compressed + span.num_keys // compress_size], dtype)


# ---- sliding window ----


def window_tiles(span: Span, window: int, unseen: int, broken: Tensor | None, device: torch.device) -> Iterator[Tile]:
    """Tiles of keys, counted from number `unseen` of the span's on."""

    def tile_of(chunk: Chunk) -> Tile:
        low = max(0, chunk.position - window + 1)
        high = chunk.position + chunk.end - chunk.begin
        distance = chunk.positions(device)[:, None] - torch.arange(low, high, device=device)
        return Tile(chunk, low - unseen, high - unseen, (distance >= 0) & (distance < window))

    return tiles_of(span, min(256, max(32, window // 8)), broken, tile_of)


@without_autocast
def window_forward(query: Tensor, key: Tensor, value: Tensor, spans: list[Span], window: int, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H)."""
    dtype = statistics_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    for span in spans:
        unseen = max(0, span.first - window + 1)  # keys before this one, no query sees
        k, v = _keys(key, span, unseen, dtype), _keys(value, span, unseen, dtype)
        for tile in window_tiles(span, window, unseen, broken_rows(k, v), query.device):
            _write_rows(query, k, v, tile, span.batch, scale, out, lse)
    return out, lse


@without_autocast
def window_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    spans: list[Span],
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `compressed_backward`."""
    dtype = lse.dtype
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    product = torch.zeros_like(lse)
    for span in spans:
        unseen = max(0, span.first - window + 1)
        k, v = _keys(key, span, unseen, dtype), _keys(value, span, unseen, dtype)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for tile in window_tiles(span, window, unseen, broken_rows(k, v), query.device):
            given = (lse, grad_out, weight, None)
            _add_gradients(query, k, v, tile, span.batch, scale, given, grad_query, grad_k, grad_v, product)
        grad_key[span.batch, span.key_begin + unseen : span.key_end] = grad_k.transpose(0, 1)
        grad_value[span.batch, span.key_begin + unseen : span.key_end] = grad_v.transpose(0, 1)
    return grad_query, grad_key, grad_value, product


def _keys(x: Tensor, span: Span, first: int, dtype: torch.dtype) -> Tensor:
    return heads_first(x[span.batch, span.key_begin + first : span.key_end], dtype)


# ---- a tile of either branch ----


def _write_rows(query: Tensor, k: Tensor, v: Tensor, tile: Tile, batch: int, scale: float, out: Tensor, lse: Tensor) -> Tensor:
    """Writes out and lse of the tile's queries; gives the probabilities but for a factor."""
    num_kv = k.shape[0]
    rows, columns = (batch, tile.rows), slice(tile.low, tile.high)
    q, bias = grouped_rows(query[rows], num_kv, k.dtype), tile.bias(query.shape[2] // num_kv, k.dtype)
    tile_out, tile_lse, weights = rows_forward(q, k[:, columns], v[:, columns], bias, scale)
    out[rows] = ungrouped(tile_out, tile.num_queries).to(out.dtype)
    lse[rows] = ungrouped(tile_lse, tile.num_queries)
    return weights


def _add_gradients(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    batch: int,
    scale: float,
    given: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    grad_query: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    product: Tensor,
) -> None:
    """Writes the tile's rows of grad_query and product, adds to grad_k and grad_v; `given` are lse, grad_out, weight, grad_lse."""
    num_kv, dtype = k.shape[0], k.dtype
    rows, columns = (batch, tile.rows), slice(tile.low, tile.high)
    lse, grad_out, weight, grad_lse = given
    part_q, part_k, part_v, part_product = rows_backward(
        grouped_rows(query[rows], num_kv, dtype),
        k[:, columns],
        v[:, columns],
        tile.bias(query.shape[2] // num_kv, dtype),
        scale,
        grouped_numbers(lse, rows, num_kv, dtype),
        grouped_rows(grad_out[rows], num_kv, dtype),
        None if weight is None else grouped_numbers(weight, rows, num_kv, dtype),
        None if grad_lse is None else grouped_numbers(grad_lse, rows, num_kv, dtype),
    )
    grad_query[rows] = ungrouped(part_q, tile.num_queries)
    product[rows] = ungrouped(part_product, tile.num_queries)
    grad_k[:, columns] += part_k
    grad_v[:, columns] += part_v
