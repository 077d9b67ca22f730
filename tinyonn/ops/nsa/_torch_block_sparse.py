"""Attention to selected key blocks in plain torch: one key block after another, each for all queries that selected it.

Each block updates the rows of its queries (online softmax), so no tensor has an entry for every (query, block) pair, and a block that
all queries selected is one large matrix product. Lists are sorted and sums have a fixed order, so two runs give the same bits. 0 times NaN
is NaN, so a block with NaN or infinity is visited query by query, with only the keys that the query sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast
from ._checks import Bounds
from ._torch_nsa import Span, broken_rows, cap_slope, capped, finite, heads_first, spans_of
from ._tuples import SparseInputs, SparseOptions

ROWS_AT_ONCE = 1 << 11  # queries of a block at a time, so that their scores stay in the cache
FEW_ROWS = 16  # at most this many queries, as in decoding, share few blocks: the keys of each query are gathered instead


class Visit(NamedTuple):
    """Some queries that selected one key block."""

    head: int
    first: int  # the block's first key in the span
    last: int
    queries: Tensor  # (r,) rows in the span, ascending
    slots: Tensor  # (r,) where the row's list holds the block
    hidden: Tensor | None  # (r, 1, keys) keys later than the query, None where there are none


def visits_of(indices: Tensor, counts: Tensor, span: Span, block_size: int, broken: Tensor | None) -> Iterator[Visit]:
    """Inverts the lists (n, K, S): the queries of each key block, in order; `broken` (m,) as in `broken_rows`."""
    _, num_kv, num_slots = indices.shape
    num_blocks = -(-span.num_keys // block_size)
    device = indices.device
    listed = torch.arange(num_slots, device=device) < counts.unsqueeze(-1)
    query, head, slot = listed.nonzero(as_tuple=True)
    key = head * num_blocks + indices[query, head, slot].long()
    key, order = key.sort(stable=True)
    query, slot = query[order], slot[order]
    sizes = torch.bincount(key, minlength=num_kv * num_blocks).tolist()
    begin = 0
    for number, size in enumerate(sizes):
        head_of, block = divmod(number, num_blocks)
        first = block * block_size
        last = min(first + block_size, span.num_keys)
        for start in range(begin, begin + size, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, begin + size))
            position = query[rows] + span.first
            hidden = None
            if int(position[0]) < last - 1:  # ascending: the first sees least
                hidden = (torch.arange(first, last, device=device) > position[:, None])[:, None]
                if broken is not None and bool((broken[first:last] & hidden).any()):
                    for one, place in zip(range(rows.start, rows.stop), position.tolist(), strict=True):
                        if place >= first:
                            yield Visit(head_of, first, min(place + 1, last), query[one : one + 1], slot[one : one + 1], None)
                    continue
            yield Visit(head_of, first, last, query[rows], slot[rows], hidden)
        begin += size


@without_autocast
def block_sparse_forward(inputs: SparseInputs, options: SparseOptions, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """out (B, T, H, D), lse (B, T, H)."""
    query, key, value, indices, counts, bias = inputs[:6]
    block_size, scale, softcap = options
    dtype = statistics_dtype(query.dtype)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    num_kv = key.shape[2]
    for span in spans_of(query, key.shape[1], block_size, bounds):
        rows = (span.batch, slice(span.query_begin, span.query_end))
        q = _by_head(query[rows], num_kv, dtype).mul_(scale)
        row_bias = None if bias is None else bias[rows]
        if span.num_queries <= FEW_ROWS:
            few_out, few_lse = _few_rows(q, key, value, indices[rows], counts[rows], row_bias, span, block_size, softcap)
            out[rows] = few_out.transpose(0, 1).flatten(1, 2).to(out.dtype)
            lse[rows] = few_lse.transpose(0, 1).flatten(1, 2)
            continue
        k, v = (heads_first(x[span.batch, span.key_begin : span.key_end], dtype) for x in (key, value))
        mixed = torch.zeros_like(q)
        top = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
        total = torch.zeros_like(top)
        for visit in visits_of(indices[rows], counts[rows], span, block_size, broken_rows(k, v)):
            scores = _seen(_scores(q, k, visit, softcap), row_bias, visit)
            old_top = top[visit.head].index_select(0, visit.queries)
            new_top = torch.maximum(old_top, scores.amax(-1))
            shift = finite(new_top)
            weights = scores.sub_(shift.unsqueeze(-1)).exp_()
            keep = (old_top - shift).exp_()
            top[visit.head].index_copy_(0, visit.queries, new_top)
            total[visit.head].index_copy_(
                0, visit.queries, total[visit.head].index_select(0, visit.queries).mul_(keep).add_(weights.sum(-1))
            )
            part = torch.mm(weights.flatten(0, 1), v[visit.head, visit.first : visit.last]).view(*weights.shape[:2], -1)
            part.addcmul_(mixed[visit.head].index_select(0, visit.queries), keep.unsqueeze(-1))
            mixed[visit.head].index_copy_(0, visit.queries, part)
        seen = total != 0
        mixed.div_(torch.where(seen, total, 1).unsqueeze(-1))
        out[rows] = mixed.transpose(0, 1).flatten(1, 2).to(out.dtype)
        lse[rows] = torch.where(seen, top + total.log(), -math.inf).transpose(0, 1).flatten(1, 2)
    return out, lse


def _few_rows(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    span: Span,
    block_size: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out (K, n, G, D), lse (K, n, G) of scaled q (K, n, G, D): each query's keys are copied together."""
    device = q.device
    slots = int(counts.max()) if counts.numel() else 0
    if not slots:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf)
    within = torch.arange(block_size, device=device)
    place = (indices[..., :slots].long().clamp(min=0).unsqueeze(-1) * block_size + within).flatten(2)  # (n, K, keys)
    position = torch.arange(span.first, span.first + span.num_queries, device=device)[:, None, None]
    listed = (torch.arange(slots, device=device) < counts.unsqueeze(-1)).repeat_interleave(block_size, -1)
    hidden = ~listed | (place > position)
    rows = span.key_begin + place.clamp(max=span.num_keys - 1).transpose(0, 1)  # (K, n, keys)
    head = torch.arange(q.shape[0], device=device)[:, None, None]
    k, v = (x[span.batch, rows, head].to(q.dtype) for x in (key, value))  # (K, n, keys, D)
    scores = capped(torch.matmul(q, k.transpose(2, 3)), softcap)
    if bias is not None:
        per_key = bias[..., :slots].to(q.dtype).repeat_interleave(block_size, -1)
        scores.add_(per_key.transpose(0, 1).unsqueeze(2))
    scores.masked_fill_(hidden.transpose(0, 1).unsqueeze(2), -math.inf)
    lse = scores.logsumexp(-1)
    if not bool(v.sum().isfinite()):
        v.masked_fill_(hidden.transpose(0, 1).unsqueeze(-1), 0)
    return torch.matmul(scores.sub_(finite(lse).unsqueeze(-1)).exp_(), v), lse


@without_autocast
def block_sparse_backward(
    inputs: SparseInputs, lse: Tensor, shift: Tensor, grad_out: Tensor, options: SparseOptions, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias; `shift` (B, T, H) is the product of out and grad_out, less the gradient of lse."""
    query, key, value, indices, counts, bias = inputs[:6]
    block_size, scale, softcap = options
    dtype = lse.dtype
    grad_query, grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    num_kv = key.shape[2]
    for span in spans_of(query, key.shape[1], block_size, bounds):
        rows = (span.batch, slice(span.query_begin, span.query_end))
        columns = (span.batch, slice(span.key_begin, span.key_end))
        q, grad = _by_head(query[rows], num_kv, dtype).mul_(scale), _by_head(grad_out[rows], num_kv, dtype)
        row_lse, row_shift = (_by_head(x[rows].unsqueeze(-1), num_kv, dtype).squeeze(-1) for x in (finite(lse), shift))
        k, v = (heads_first(x[span.batch, span.key_begin : span.key_end], dtype) for x in (key, value))
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        row_bias = None if bias is None else bias[rows]
        for visit in visits_of(indices[rows], counts[rows], span, block_size, broken_rows(k, v)):
            head, block = visit.head, slice(visit.first, visit.last)
            lse_of, shift_of = (x[head].index_select(0, visit.queries).unsqueeze(-1) for x in (row_lse, row_shift))
            scores = _scores(q, k, visit, softcap)
            slope = None if softcap is None else cap_slope(scores, softcap)
            weights = _seen(scores, row_bias, visit).sub_(lse_of).exp_()
            weights2 = weights.flatten(0, 1)
            grad_of = grad[head].index_select(0, visit.queries).flatten(0, 1)
            torch.addmm(grad_v[head, block], weights2.T, grad_of, out=grad_v[head, block])
            grad_scores = torch.mm(grad_of, v[head, block].T).view(weights.shape).sub_(shift_of).mul_(weights)
            if grad_bias is not None:
                grad_bias[span.batch, span.query_begin + visit.queries, head, visit.slots] = grad_scores.sum((-1, -2))
            if slope is not None:
                grad_scores.mul_(slope)
            flat = grad_scores.flatten(0, 1)
            q_of = q[head].index_select(0, visit.queries).flatten(0, 1)
            torch.addmm(grad_k[head, block], flat.T, q_of, out=grad_k[head, block])
            grad_q[head].index_add_(0, visit.queries, torch.mm(flat, k[head, block]).view(*weights.shape[:2], -1))
        grad_query[rows] = grad_q.mul_(scale).transpose(0, 1).flatten(1, 2)
        grad_key[columns], grad_value[columns] = grad_k.transpose(0, 1), grad_v.transpose(0, 1)
    return grad_query, grad_key, grad_value, grad_bias


def _scores(q: Tensor, k: Tensor, visit: Visit, softcap: float | None) -> Tensor:
    """(r, G, keys); q is scaled."""
    rows = q[visit.head].index_select(0, visit.queries)
    return capped(torch.mm(rows.flatten(0, 1), k[visit.head, visit.first : visit.last].T).view(*rows.shape[:2], -1), softcap)


def _seen(scores: Tensor, bias: Tensor | None, visit: Visit) -> Tensor:
    """The scores with the bias of each row's block, -inf for keys later than the query; in place."""
    if bias is not None:
        scores.add_(bias[visit.queries, visit.head, visit.slots].to(scores.dtype)[:, None, None])
    return scores if visit.hidden is None else scores.masked_fill_(visit.hidden, -math.inf)


def _by_head(x: Tensor, num_kv: int, dtype: torch.dtype) -> Tensor:
    """(n, H, D) -> (K, n, G, D) contiguous."""
    return x.unflatten(1, (num_kv, -1)).transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format)
