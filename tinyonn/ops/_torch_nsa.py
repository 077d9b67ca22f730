"""DynNSA in plain torch: rows of queries against the keys they see, selected blocks one key block at a time.

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

Z_FLOOR = -20.0
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
        k, v = _compressed(key, span, compress_size, dtype), _compressed(value, span, compress_size, dtype)
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
        k, v = _compressed(key, span, compress_size, dtype), _compressed(value, span, compress_size, dtype)
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


def _compressed(compressed: Tensor, span: Span, compress_size: int, dtype: torch.dtype) -> Tensor:
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


# ---- selection ----


class Importance(NamedTuple):
    """Of one chunk: what the gates are made of. Blocks up to the chunk's last own block."""

    probabilities: Tensor  # (K, G * n, m)
    mass: Tensor  # (K, n, NB)
    floor: Tensor  # (n, 1), the mass at which z is Z_FLOOR
    gap: Tensor  # (K, n, NB), (z - threshold) / temperature
    past: Tensor  # (n, NB)
    forced: Tensor  # (n, NB)


def importance_of(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    threshold: Tensor,
    chunk: Chunk,
    visible: Tensor,
    temperature: float,
    ratio: int,
    block_size: int,
    scale: float,
) -> Importance:
    """q (K, G * n, D), k (K, m, D), lse (K, G * n), threshold (K, n)."""
    n = chunk.end - chunk.begin
    num_kv, rows, _ = q.shape
    device, dtype = q.device, q.dtype
    place = chunk.positions(device)
    own = place // block_size
    block = torch.arange(int(chunk.position + n - 1) // block_size + 1, device=device)
    past = (block + 1) * block_size <= place[:, None] + 1
    forced = (block == 0) | (block == own[:, None] - 1) | (block == own[:, None])
    bias = hidden_bias(visible, rows // n, dtype)
    probabilities = row_scores(q, k, bias, scale).sub_(finite(lse).unsqueeze(-1)).exp_()
    mean = probabilities.view(num_kv, rows // n, n, probabilities.shape[-1]).mean(1)
    mass = torch.nn.functional.pad(mean, (0, len(block) * ratio - mean.shape[-1])).unflatten(-1, (len(block), ratio)).sum(-1)
    uniform = ((place + 1) // (block_size // ratio)).to(dtype).div_(ratio).clamp_(min=1 / ratio)[:, None]
    floor = math.exp(Z_FLOOR) / uniform
    z = torch.maximum(mass, floor).mul_(uniform).log_()
    return Importance(probabilities, mass, floor, (z - threshold.unsqueeze(-1)) / temperature, past, forced)


def smallest_step(dtype: torch.dtype) -> float:
    """c whose gate, about 3c², is still a normal number; a smaller one is 0, and its logarithm has no place in a gradient."""
    return math.sqrt(torch.finfo(dtype).tiny)


@without_autocast
def select_forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    spans: list[Span],
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts, overflow; see `select_blocks`."""
    batch, num_queries, heads, _ = query.shape
    num_kv, device = key.shape[2], query.device
    dtype = compute_dtype(query.dtype)
    indices = torch.full((batch, num_queries, num_kv, max_blocks), -1, dtype=torch.int32, device=device)
    counts = torch.zeros((batch, num_queries, num_kv), dtype=torch.int32, device=device)
    bias = torch.zeros(indices.shape, dtype=dtype, device=device)
    soft_counts = torch.zeros(counts.shape, dtype=dtype, device=device)
    overflowing = torch.zeros((), dtype=torch.int64, device=device)
    smallest = smallest_step(dtype)
    for span in spans:
        k = _compressed(key, span, compress_size, dtype)
        for chunk in compressed_chunks(span, heads, compress_size):
            rows = (span.batch, slice(chunk.begin, chunk.end))
            found = _importance(query, k, lse, threshold, span, chunk, rows, temperature, block_size, compress_size, scale)
            c = found.gap.clamp(0, 1)
            wanted = ((c > smallest) & found.past) | found.forced
            number = wanted.sum(-1)
            over = number > max_blocks
            if bool(over.any()):
                overflowing += over.sum()
                wanted = _best(wanted, found, over, max_blocks)
                number = wanted.sum(-1)
            # The slot of a kept block is the number of kept blocks before it.
            head, row, block = wanted.nonzero(as_tuple=True)
            slot = (wanted.cumsum(-1) - 1)[head, row, block]
            chosen = c[head, row, block]
            log_gate = torch.where(found.forced[row, block], 0, (chosen * chosen * (3 - 2 * chosen)).log())
            indices[span.batch, chunk.begin + row, head, slot] = block.to(torch.int32)
            bias[span.batch, chunk.begin + row, head, slot] = log_gate
            counts[rows] = number.T.to(torch.int32)
            soft = torch.where(found.forced, 1, found.gap.sigmoid() * found.past).sum(-1)
            soft_counts[rows] = soft.T
    overflow = overflowing.to(dtype) / max(1, counts.numel())
    return indices, counts, bias, soft_counts, overflow


@without_autocast
def select_backward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    indices: Tensor,
    counts: Tensor,
    grad_bias: Tensor,
    grad_soft: Tensor | None,
    spans: list[Span],
    temperature: float,
    block_size: int,
    compress_size: int,
    scale: float,
    scores_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    heads, num_kv = query.shape[2], key.shape[2]
    dtype, device = lse.dtype, query.device
    grad_threshold = torch.zeros(threshold.shape, dtype=dtype, device=device)
    if scores_too:
        grad_query, grad_key = (torch.zeros(x.shape, dtype=dtype, device=device) for x in (query, key))
        grad_lse = torch.zeros_like(lse)
    ratio, smallest = block_size // compress_size, smallest_step(dtype)
    slots = torch.arange(indices.shape[-1], device=device)
    for span in spans:
        k = _compressed(key, span, compress_size, dtype)
        for chunk in compressed_chunks(span, heads, compress_size):
            rows = (span.batch, slice(chunk.begin, chunk.end))
            found = _importance(query, k, lse, threshold, span, chunk, rows, temperature, block_size, compress_size, scale)
            n, num_blocks = found.past.shape
            # grad of log(gate): d log(c² (3 − 2c)) / dc = 6 (1 − c) / (c (3 − 2c)), for the kept blocks alone.
            listed = slots < counts[rows].unsqueeze(-1)
            place = indices[rows].long().clamp(min=0)
            grad_gate = torch.zeros((n, num_kv, num_blocks), dtype=dtype, device=device)
            grad_gate.scatter_add_(-1, place, grad_bias[rows].to(dtype) * listed)
            c = found.gap.clamp(0, 1)
            inside = (c > smallest) & (c < 1) & found.past & ~found.forced
            slope = torch.where(inside, 6 * (1 - c) / torch.where(inside, c * (3 - 2 * c), 1), 0)
            grad_gap = grad_gate.transpose(0, 1) * slope
            if grad_soft is not None:
                sigmoid = found.gap.sigmoid()
                grad_gap += sigmoid * (1 - sigmoid) * (found.past & ~found.forced) * grad_soft[rows].to(dtype).T.unsqueeze(-1)
            grad_z = grad_gap.div_(temperature)
            grad_threshold[rows] = -grad_z.sum(-1).T
            if not scores_too or k.shape[1] == 0:
                continue
            above = found.mass > found.floor
            grad_mass = torch.where(above, grad_z / torch.where(above, found.mass, 1), 0)
            seen = found.probabilities.shape[-1]
            per_key = grad_mass.repeat_interleave(ratio, -1)[..., :seen].mul_(num_kv / heads)
            grad_scores = found.probabilities.view(num_kv, heads // num_kv, n, seen).mul(per_key.unsqueeze(1)).flatten(1, 2)
            grad_lse[rows] = -ungrouped(grad_scores.sum(-1), n)
            grad_scores.mul_(scale)
            grad_query[rows] = ungrouped(torch.bmm(grad_scores, k[:, :seen]), n)
            into = grad_key[span.batch, span.compressed : span.compressed + seen]
            into += torch.bmm(grad_scores.transpose(1, 2), grouped_rows(query[rows], num_kv, dtype)).transpose(0, 1)
    return (grad_threshold, grad_query, grad_key, grad_lse) if scores_too else (grad_threshold, None, None, None)


def _importance(
    query: Tensor,
    k: Tensor,
    lse: Tensor,
    threshold: Tensor,
    span: Span,
    chunk: Chunk,
    rows: tuple[int, slice],
    temperature: float,
    block_size: int,
    compress_size: int,
    scale: float,
) -> Importance:
    num_kv = k.shape[0]
    seen, visible = visible_compressed(chunk, span, compress_size, query.device)
    q = grouped_rows(query[rows], num_kv, k.dtype)
    chunk_lse = grouped_rows(lse[rows].unsqueeze(-1), num_kv, k.dtype).squeeze(-1)
    limit = threshold[rows].to(k.dtype).T
    return importance_of(q, k[:, :seen], chunk_lse, limit, chunk, visible, temperature, block_size // compress_size, block_size, scale)


def _best(wanted: Tensor, found: Importance, over: Tensor, max_blocks: int) -> Tensor:
    """Keeps, in the rows that overflow, the forced blocks and the most important others; ties go to the lower index."""
    forced = found.forced.expand_as(wanted)[over]
    rank_by = found.gap[over].masked_fill(forced, math.inf).masked_fill(~wanted[over], -math.inf)
    best = rank_by.sort(dim=-1, descending=True, stable=True).indices[:, :max_blocks]
    kept = torch.zeros_like(rank_by, dtype=torch.bool).scatter_(-1, best, True)
    wanted = wanted.clone()
    wanted[over] = kept
    return wanted
