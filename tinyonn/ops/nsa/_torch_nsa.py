"""The compressed branch and the window in plain torch: attention of each query to the keys that it sees.

    n queries and m keys of one sequence, H query heads, K key/value heads, G = H / K, D head dim, NB key blocks, S slots of a row

Sequences (`Span`) are computed one after another, tile by tile, and short ones of similar length together (`Bundle`); the heads of a group
are rows of one matrix product. Half precision is converted to float32 tile by tile. 0 times NaN is NaN, so a key or value that is not
finite must not meet a query that does not see it: tiles with such a key are split into single queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast
from ._checks import Bounds
from ._tuples import CompressedOptions, CompressedSaved, QueryKeyValue, WindowOptions, WindowSaved

ROW_ELEMENTS = 1 << 20  # scores of a chunk of queries, all heads: they stay in the cache
SHORT = 256  # keys of a sequence that is computed together with others


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


def spans_of(query: Tensor, num_keys: int, compress_size: int, bounds: Bounds) -> list[Span]:
    """The sequences of a batch without their padding. Reads the values of the bounds."""
    cu_seqlens, key_start, key_end = bounds
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
    """Tiles of `size` queries; of one query if a key of the tile that some query does not see is `broken` (m,)."""
    for chunk in chunks_of(span.query_begin, span.query_end, span.first, size):
        tile = tile_of(chunk)
        if broken is not None and bool((broken[tile.low : tile.high] & ~tile.visible).any()):
            yield from map(tile_of, chunks_of(*chunk, 1))
        else:
            yield tile


def broken_rows(*tensors: Tensor) -> Tensor | None:
    """(m,) bool, rows of (K, m, D) that contain NaN, infinity or numbers whose sum overflows; None if there are none."""
    finite_sums = torch.stack([x.sum(-1) for x in tensors]).isfinite().all(0).all(0)
    return None if bool(finite_sums.all()) else ~finite_sums


def grouped_rows(x: Tensor, num_kv: int, dtype: torch.dtype) -> Tensor:
    """(n, H, D) -> (K, G * n, D), a group's heads one after another."""
    n, heads, dim = x.shape
    return x.to(dtype).reshape(n, num_kv, heads // num_kv, dim).permute(1, 2, 0, 3).reshape(num_kv, heads // num_kv * n, dim)


def grouped_numbers(x: Tensor, num_kv: int, dtype: torch.dtype) -> Tensor:
    """(n, H) -> (K, G * n)."""
    return grouped_rows(x.unsqueeze(-1), num_kv, dtype).squeeze(-1)


def ungrouped(x: Tensor, n: int) -> Tensor:
    """(K, G * n, ...) -> (n, H, ...)."""
    return x.unflatten(1, (-1, n)).movedim(2, 0).flatten(1, 2)


def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, K, D) -> (K, m, D) contiguous."""
    return x.to(dtype).transpose(0, 1).contiguous()


# ---- rows: a chunk of queries against consecutive keys ----


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(scores / softcap), in place."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def cap_slope(scores: Tensor, softcap: float) -> Tensor:
    """Derivative of `capped`, from its result; 0 for a score of -inf, which nobody sees."""
    return scores.div(softcap).square_().clamp_(max=1).neg_().add_(1)


def row_scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """(K, R, D), (K, m, D) -> (K, R, m); `bias` is 0 or -inf."""
    scores = capped(torch.bmm(q, k.transpose(1, 2)).mul_(scale), softcap)
    return scores if bias is None else scores.add_(bias)


def rows_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over each row: out (K, R, D), lse (K, R), unnormalised probabilities (K, R, m); 0, -inf and 0 for a row without keys."""
    scores = row_scores(q, k, bias, scale, softcap)
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
    softcap: float | None,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the gradient `grad_out` of `weight * out`; and (K, R), the product of out and grad_out."""
    scores = row_scores(q, k, bias, scale, softcap)
    slope = None if softcap is None else cap_slope(scores, softcap)
    probabilities = scores.sub_(finite(lse).unsqueeze(-1)).exp_()
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
    if slope is not None:
        grad.mul_(slope)
    return torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q), grad_v, product


def finite(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf, so that exp(-inf - lse) is 0 for a row without a visible key."""
    return lse.masked_fill(lse == -math.inf, 0)


class Compressed(NamedTuple):
    """The compressed branch."""

    heads: int
    compress_size: int
    device: torch.device

    def rows(self, span: Span) -> slice:
        """Rows of the span's compressed keys."""
        return slice(span.compressed, span.compressed + span.num_keys // self.compress_size)

    def tiles(self, span: Span, broken: Tensor | None) -> Iterator[Tile]:
        """Tiles of compressed keys, from the span's first on; `high` is 0 where no query sees any."""
        most = span.num_keys // self.compress_size
        ends = torch.arange(1, most + 1, device=self.device) * self.compress_size

        def tile_of(chunk: Chunk) -> Tile:
            seen = min((chunk.position + chunk.end - chunk.begin) // self.compress_size, most)
            return Tile(chunk, 0, seen, ends[:seen] <= chunk.positions(self.device)[:, None] + 1)

        size = max(16, min(1024, ROW_ELEMENTS // (self.heads * max(1, most))))
        return tiles_of(span, size, broken, tile_of)


class Window(NamedTuple):
    """The window."""

    window: int
    device: torch.device

    def unseen(self, span: Span) -> int:
        """Number of keys at the start of the span that no query sees."""
        return max(0, span.first - self.window + 1)

    def rows(self, span: Span) -> slice:
        return slice(span.key_begin + self.unseen(span), span.key_end)

    def tiles(self, span: Span, broken: Tensor | None) -> Iterator[Tile]:
        """Tiles of keys, counted from the first of `rows` on."""
        unseen = self.unseen(span)

        def tile_of(chunk: Chunk) -> Tile:
            low = max(0, chunk.position - self.window + 1)
            high = chunk.position + chunk.end - chunk.begin
            distance = chunk.positions(self.device)[:, None] - torch.arange(low, high, device=self.device)
            return Tile(chunk, low - unseen, high - unseen, (distance >= 0) & (distance < self.window))

        return tiles_of(span, min(256, max(32, self.window // 8)), broken, tile_of)


class Bundle(NamedTuple):
    """Sequences of similar length, padded by repeating each one's last token: S sequences, L tokens of the longest.

    Attributes:
        spans: the sequences.
        rows: (S, L) of the flattened rows (B * T) of queries and keys alike.
        inside: (S, L) bool, False for padding. Padded keys come last, so only padded queries see them.
        bias: (G * L, L), 0 where visible and -inf where not.
    """

    spans: list[Span]
    rows: Tensor
    inside: Tensor
    bias: Tensor

    def grouped(self, x: Tensor, num_kv: int, dtype: torch.dtype) -> Tensor:
        """(B, T, H, ·) -> (S * K, G * L, ·), a group's heads one after another; 0-dimensional features stay so."""
        picked = x.flatten(0, 1)[self.rows].to(dtype)  # (S, L, H, ...)
        return picked.unflatten(2, (num_kv, -1)).transpose(1, 3).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def store(self, out: Tensor, x: Tensor, num_kv: int) -> None:
        """Writes (S * K, G * L, ...) to the rows of (B, T, H, ...), without padding."""
        number, length = self.rows.shape
        rows = x.unflatten(1, (-1, length)).unflatten(0, (number, num_kv)).movedim(3, 1).flatten(2, 3)  # (S, L, H, ...)
        out.view(-1, *out.shape[2:])[self.rows[self.inside]] = rows[self.inside].to(out.dtype)


def bundled(query: Tensor, key: Tensor, branch: Compressed | Window, spans: list[Span]) -> tuple[list[Bundle], list[Span]]:
    """Bundles of short sequences of a window, and the sequences that are left for one by one."""
    if not isinstance(branch, Window) or len(spans) < 2 or query.shape[1] != key.shape[1]:
        return [], spans
    heads = query.shape[2]
    found, alone, group = [], [span for span in spans if span.num_keys > SHORT], list[Span]()

    def close() -> None:
        if len(group) > 1:
            found.append(_bundle(group, query, key, branch))
        else:
            alone.extend(group)

    for span in sorted((span for span in spans if span.num_keys <= SHORT), key=lambda span: span.num_keys):
        size = span.num_keys
        if group and (size > 8 + group[0].num_keys * 5 // 4 or (len(group) + 1) * heads * size * size > ROW_ELEMENTS):
            close()
            group = []
        group.append(span)
    close()
    return found, alone


def _bundle(spans: list[Span], query: Tensor, key: Tensor, branch: Window) -> Bundle:
    device, length = query.device, spans[-1].num_keys
    begins = torch.tensor([span.batch * query.shape[1] + span.query_begin for span in spans], device=device)
    lengths = torch.tensor([span.num_keys for span in spans], device=device)
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    visible = (distance >= 0) & (distance < branch.window)
    bias = torch.zeros(length, length, dtype=statistics_dtype(query.dtype), device=device).masked_fill_(~visible, -math.inf)
    rows = begins[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return Bundle(spans, rows, place < lengths[:, None], bias.repeat(query.shape[2] // key.shape[2], 1))


@without_autocast
def _forward(
    inputs: QueryKeyValue, branch: Compressed | Window, spans: list[Span], scale: float, softcap: float | None, entropy_too: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H), entropy (B, T, H)."""
    query, key, value = inputs[:3]
    dtype, num_kv = statistics_dtype(query.dtype), key.shape[2]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    entropy = torch.zeros_like(lse)
    bundles, spans = bundled(query, key, branch, spans)
    for bundle in bundles:
        k, v = (bundle.grouped(x, num_kv, dtype) for x in (key, value))
        if broken_rows(k, v) is not None:
            spans = [*spans, *bundle.spans]
            continue
        found_out, found_lse, _ = rows_forward(bundle.grouped(query, num_kv, dtype), k, v, bundle.bias, scale, softcap)
        bundle.store(out, found_out, num_kv)
        bundle.store(lse, found_lse, num_kv)
    for span in spans:
        k, v = (heads_first(x[span.batch, branch.rows(span)], dtype) for x in (key, value))
        for tile in branch.tiles(span, broken_rows(k, v)):
            if tile.high == tile.low:
                continue
            rows, columns = (span.batch, tile.rows), slice(tile.low, tile.high)
            q, bias = grouped_rows(query[rows], num_kv, dtype), tile.bias(query.shape[2] // num_kv, dtype)
            tile_out, tile_lse, weights = rows_forward(q, k[:, columns], v[:, columns], bias, scale, softcap)
            out[rows] = ungrouped(tile_out, tile.num_queries).to(out.dtype)
            lse[rows] = ungrouped(tile_lse, tile.num_queries)
            if entropy_too:
                probabilities = weights.div_(weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny))
                entropy[rows] = ungrouped(torch.special.entr(probabilities).sum(-1), tile.num_queries)
    return out, lse, entropy


@without_autocast
def _backward(
    inputs: QueryKeyValue,
    saved: CompressedSaved,
    weight: Tensor | None,
    branch: Compressed | Window,
    spans: list[Span],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in the dtype of computation, given the gradient `grad_out` of `weight * out`; and (B, T, H),
    the product of out and grad_out.
    """
    query, key, value = inputs[:3]
    lse, grad_out, grad_lse = saved
    dtype, num_kv = lse.dtype, key.shape[2]
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    product = torch.zeros_like(lse)
    bundles, spans = bundled(query, key, branch, spans)
    for bundle in bundles:
        k, v = (bundle.grouped(x, num_kv, dtype) for x in (key, value))
        if broken_rows(k, v) is not None:
            spans = [*spans, *bundle.spans]
            continue
        padding = (~bundle.inside).repeat_interleave(num_kv, 0).repeat(1, query.shape[2] // num_kv)  # (S * K, G * L)
        q, row_lse, grad, factor, slope = (
            None if x is None else bundle.grouped(x, num_kv, dtype) for x in (query, lse, grad_out, weight, grad_lse)
        )
        assert q is not None
        assert row_lse is not None
        assert grad is not None
        grad = grad.masked_fill(padding.unsqueeze(-1), 0)
        slope = None if slope is None else slope.masked_fill(padding, 0)
        *parts, found = rows_backward(q, k, v, bundle.bias, scale, softcap, row_lse, grad, factor, slope)
        for target, part in zip((grad_query, grad_key, grad_value, product), (*parts, found), strict=True):
            bundle.store(target, part, num_kv)
    for span in spans:
        here = (span.batch, branch.rows(span))
        k, v = (heads_first(x[here], dtype) for x in (key, value))
        grad_k, grad_v = (x[here].transpose(0, 1) for x in (grad_key, grad_value))
        for tile in branch.tiles(span, broken_rows(k, v)):
            if tile.high == tile.low:
                continue
            rows, columns = (span.batch, tile.rows), slice(tile.low, tile.high)
            q, grad = (grouped_rows(x[rows], num_kv, dtype) for x in (query, grad_out))
            row_lse, bias = grouped_numbers(lse[rows], num_kv, dtype), tile.bias(query.shape[2] // num_kv, dtype)
            optional = (None if x is None else grouped_numbers(x[rows], num_kv, dtype) for x in (weight, grad_lse))
            part_q, part_k, part_v, part_product = rows_backward(
                q, k[:, columns], v[:, columns], bias, scale, softcap, row_lse, grad, *optional
            )
            grad_query[rows] = ungrouped(part_q, tile.num_queries)
            product[rows] = ungrouped(part_product, tile.num_queries)
            grad_k[:, columns] += part_k
            grad_v[:, columns] += part_v
    return grad_query, grad_key, grad_value, product


def compressed_forward(inputs: QueryKeyValue, options: CompressedOptions, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, entropy."""
    query, (compress_size, num_keys, scale, softcap) = inputs.query, options
    branch = Compressed(query.shape[2], compress_size, query.device)
    return _forward(inputs, branch, spans_of(query, num_keys, compress_size, bounds), scale, softcap, True)


def compressed_backward(
    inputs: QueryKeyValue, saved: CompressedSaved, options: CompressedOptions, bounds: Bounds, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_backward`."""
    query, (compress_size, num_keys, scale, softcap) = inputs.query, options
    branch = Compressed(query.shape[2], compress_size, query.device)
    return _backward(inputs, saved, weight, branch, spans_of(query, num_keys, compress_size, bounds), scale, softcap)


def window_forward(inputs: QueryKeyValue, options: WindowOptions, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """out, lse."""
    branch, spans = Window(options.window, inputs.query.device), spans_of(inputs.query, inputs.key.shape[1], 1, bounds)
    return _forward(inputs, branch, spans, options.scale, options.softcap, False)[:2]


def window_backward(
    inputs: QueryKeyValue, saved: WindowSaved, options: WindowOptions, bounds: Bounds, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_backward`."""
    branch, spans = Window(options.window, inputs.query.device), spans_of(inputs.query, inputs.key.shape[1], 1, bounds)
    return _backward(inputs, CompressedSaved(*saved, None), weight, branch, spans, options.scale, options.softcap)
