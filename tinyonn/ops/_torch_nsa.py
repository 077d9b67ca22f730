"""The compressed branch and the window in plain torch: rows of queries against the keys they see.

    n queries and m keys of one sequence, H query heads, K key/value heads, G = H / K, D head dim, NB key blocks, S slots of a row

Everything here works on one sequence (`Span`) and one chunk of it after another; heads of a group are rows of one matrix product.
Half precision is widened to float32 chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import without_autocast

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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Chunk(NamedTuple):
    """Consecutive queries of a span: rows of the batch row, and the first one's position."""

    begin: int
    end: int
    position: int

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.position, self.position + self.end - self.begin, device=device)


def chunks_of(span: Span, size: int) -> Iterator[Chunk]:
    for begin in range(span.query_begin, span.query_end, size):
        yield Chunk(begin, min(begin + size, span.query_end), span.first + begin - span.query_begin)


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


def hidden_bias(visible: Tensor, group: int, dtype: torch.dtype) -> Tensor | None:
    """(n, m) -> (G * n, m), 0 where visible and -inf where not; None where all are."""
    if bool(visible.all()):
        return None
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)
    return bias.repeat(group, 1)


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


def visible_compressed(chunk: Chunk, span: Span, compress_size: int, device: torch.device) -> tuple[int, Tensor]:
    """How many compressed keys the chunk's last query sees, and which of them each query sees (n, that many)."""
    seen = min((chunk.position + chunk.end - chunk.begin) // compress_size, span.num_keys // compress_size)
    ends = torch.arange(1, seen + 1, device=device) * compress_size
    return seen, ends <= chunk.positions(device)[:, None] + 1


def compressed_chunks(span: Span, heads: int, compress_size: int) -> Iterator[Chunk]:
    most = max(1, span.num_keys // compress_size)
    return chunks_of(span, max(16, min(1024, ROW_ELEMENTS // (heads * most))))


@without_autocast
def compressed_forward(
    query: Tensor, key: Tensor, value: Tensor, spans: list[Span], compress_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H), entropy (B, T, H)."""
    heads, num_kv = query.shape[2], key.shape[2]
    dtype = compute_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    entropy = torch.zeros_like(lse)
    for span in spans:
        k, v = compressed_keys(key, span, compress_size, dtype), compressed_keys(value, span, compress_size, dtype)
        for chunk in compressed_chunks(span, heads, compress_size):
            seen, visible = visible_compressed(chunk, span, compress_size, query.device)
            if not seen:
                continue
            rows = (span.batch, slice(chunk.begin, chunk.end))
            n = chunk.end - chunk.begin
            bias = hidden_bias(visible, heads // num_kv, dtype)
            chunk_out, chunk_lse, weights = rows_forward(grouped_rows(query[rows], num_kv, dtype), k[:, :seen], v[:, :seen], bias, scale)
            out[rows] = ungrouped(chunk_out, n).to(out.dtype)
            lse[rows] = ungrouped(chunk_lse, n)
            probabilities = weights.div_(weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny))
            entropy[rows] = ungrouped(torch.special.entr(probabilities).sum(-1), n)
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
    heads, num_kv = query.shape[2], key.shape[2]
    dtype = lse.dtype
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    product = torch.zeros_like(lse)
    for span in spans:
        k, v = compressed_keys(key, span, compress_size, dtype), compressed_keys(value, span, compress_size, dtype)
        into = slice(span.compressed, span.compressed + k.shape[1])
        grad_k, grad_v = grad_key[span.batch, into].transpose(0, 1), grad_value[span.batch, into].transpose(0, 1)
        for chunk in compressed_chunks(span, heads, compress_size):
            seen, visible = visible_compressed(chunk, span, compress_size, query.device)
            if not seen:
                continue
            rows = (span.batch, slice(chunk.begin, chunk.end))
            n = chunk.end - chunk.begin
            part_q, part_k, part_v, part_product = rows_backward(
                grouped_rows(query[rows], num_kv, dtype),
                k[:, :seen],
                v[:, :seen],
                hidden_bias(visible, heads // num_kv, dtype),
                scale,
                grouped_numbers(lse, rows, num_kv, dtype),
                grouped_rows(grad_out[rows], num_kv, dtype),
                None if weight is None else grouped_numbers(weight, rows, num_kv, dtype),
                None if grad_lse is None else grouped_numbers(grad_lse, rows, num_kv, dtype),
            )
            grad_query[rows] = ungrouped(part_q, n)
            product[rows] = ungrouped(part_product, n)
            grad_k[:, :seen] += part_k
            grad_v[:, :seen] += part_v
    return grad_query, grad_key, grad_value, product


def compressed_keys(compressed: Tensor, span: Span, compress_size: int, dtype: torch.dtype) -> Tensor:
    return heads_first(compressed[span.batch, span.compressed : span.compressed + span.num_keys // compress_size], dtype)


# ---- sliding window ----


def window_chunks(span: Span, window: int) -> Iterator[Chunk]:
    return chunks_of(span, min(256, max(32, window // 8)))


def window_keys(chunk: Chunk, span: Span, window: int, device: torch.device) -> tuple[int, int, Tensor]:
    """The keys that a chunk's queries see, [low, high), and which of them each query sees (n, high - low)."""
    low = max(0, chunk.position - window + 1)
    high = chunk.position + chunk.end - chunk.begin
    distance = chunk.positions(device)[:, None] - torch.arange(low, high, device=device)
    return low, high, (distance >= 0) & (distance < window)


@without_autocast
def window_forward(query: Tensor, key: Tensor, value: Tensor, spans: list[Span], window: int, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H)."""
    heads, num_kv = query.shape[2], key.shape[2]
    dtype = compute_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    for span in spans:
        unseen = max(0, span.first - window + 1)  # keys before this one, no query sees
        k, v = _keys(key, span, unseen, dtype), _keys(value, span, unseen, dtype)
        for chunk in window_chunks(span, window):
            low, high, visible = window_keys(chunk, span, window, query.device)
            rows = (span.batch, slice(chunk.begin, chunk.end))
            bias = hidden_bias(visible, heads // num_kv, dtype)
            chunk_out, chunk_lse, _ = rows_forward(
                grouped_rows(query[rows], num_kv, dtype),
                k[:, low - unseen : high - unseen],
                v[:, low - unseen : high - unseen],
                bias,
                scale,
            )
            out[rows] = ungrouped(chunk_out, chunk.end - chunk.begin).to(out.dtype)
            lse[rows] = ungrouped(chunk_lse, chunk.end - chunk.begin)
    return out, lse


@without_autocast
def window_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    weight: Tensor | None,
    grad_lse: Tensor | None,
    spans: list[Span],
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `compressed_backward`."""
    heads, num_kv = query.shape[2], key.shape[2]
    dtype = lse.dtype
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    product = torch.zeros_like(lse)
    for span in spans:
        unseen = max(0, span.first - window + 1)
        k, v = _keys(key, span, unseen, dtype), _keys(value, span, unseen, dtype)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for chunk in window_chunks(span, window):
            low, high, visible = window_keys(chunk, span, window, query.device)
            rows = (span.batch, slice(chunk.begin, chunk.end))
            n = chunk.end - chunk.begin
            part_q, part_k, part_v, part_product = rows_backward(
                grouped_rows(query[rows], num_kv, dtype),
                k[:, low - unseen : high - unseen],
                v[:, low - unseen : high - unseen],
                hidden_bias(visible, heads // num_kv, dtype),
                scale,
                grouped_numbers(lse, rows, num_kv, dtype),
                grouped_rows(grad_out[rows], num_kv, dtype),
                None if weight is None else grouped_numbers(weight, rows, num_kv, dtype),
                None if grad_lse is None else grouped_numbers(grad_lse, rows, num_kv, dtype),
            )
            grad_query[rows] = ungrouped(part_q, n)
            product[rows] = ungrouped(part_product, n)
            grad_k[:, low - unseen : high - unseen] += part_k
            grad_v[:, low - unseen : high - unseen] += part_v
        grad_key[span.batch, span.key_begin + unseen : span.key_end] = grad_k.transpose(0, 1)
        grad_value[span.batch, span.key_begin + unseen : span.key_end] = grad_v.transpose(0, 1)
    return grad_query, grad_key, grad_value, product


def _keys(x: Tensor, span: Span, first: int, dtype: torch.dtype) -> Tensor:
    return heads_first(x[span.batch, span.key_begin + first : span.key_end], dtype)
