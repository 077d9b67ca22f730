"""One sequence of DynNSA's oracle: which rows it has, and the attention of each of its queries to its keys, dense and in float64.

n queries and m keys of one sequence, H query heads, K key/value heads, D head dim, NB key blocks
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """One sequence: the rows of its queries and keys, its first compressed key's row, the position of its first query."""

    batch: int
    queries: slice
    keys: slice
    compressed: int
    first: int


def sequences(
    query: Tensor,
    num_keys: int,
    compress_size: int,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Iterator[Sequence]:
    """Packed sequences, or one a batch row without its padding; queries are a row's last."""
    batch, num_queries = query.shape[:2]
    if cu_seqlens is not None:
        for begin, end in pairwise(cu_seqlens.tolist()):
            yield Sequence(0, slice(begin, end), slice(begin, end), begin // compress_size, 0)
        return
    before = num_keys - num_queries
    for row in range(batch):
        start = 0 if key_start is None else int(key_start[row])
        end = num_keys if key_end is None else max(start, int(key_end[row]))  # a start after the end: a row of padding alone
        first = max(start, before)
        yield Sequence(row, slice(first - before, max(end, first) - before), slice(start, end), 0, first - start)


def positions(sequence: Sequence, device: torch.device) -> Tensor:
    """(n,) place of each query in its sequence."""
    return torch.arange(sequence.queries.stop - sequence.queries.start, device=device) + sequence.first


def compressed_keys(compressed: Tensor, sequence: Sequence, compress_size: int) -> tuple[Tensor, Tensor]:
    """A sequence's compressed keys (m, K, D), and which of them each query sees (n, m)."""
    m = (sequence.keys.stop - sequence.keys.start) // compress_size
    keys = compressed[sequence.batch, sequence.compressed : sequence.compressed + m]
    ends = (torch.arange(m, device=compressed.device) + 1) * compress_size
    return keys, ends <= positions(sequence, compressed.device)[:, None] + 1


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """(·, K, ·) -> (·, H, ·)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def scores_of(query: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(n, H, D) and (m, K, D) -> (n, H, m)."""
    scores = torch.einsum("nhd,mhd->nhm", query, _per_query_head(keys, query.shape[1])) * scale
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def probabilities_of(scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
    """exp(score - lse), 0 where not visible."""
    any_visible = visible.any(-1, keepdim=True)
    return torch.where(visible, (scores - torch.where(any_visible, lse[..., None], 0.0)).masked_fill(~visible, 0.0).exp(), 0.0)


def empty_lse(query: Tensor, sinks: Tensor | None) -> Tensor:
    """(B, T, H), lse of queries that see no key."""
    lse = query.new_full(query.shape[:3], -math.inf)
    return lse if sinks is None else sinks.double().expand(lse.shape).clone()


def attend(scores: Tensor, visible: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible (n, H, m), and the sinks (H,), of values (m, K or H, D): out (n, H, D), lse (n, H)."""
    values = _per_query_head(values, scores.shape[1])
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None].expand(len(scores), -1, 1)], -1)
        visible = torch.cat([visible, visible.new_ones((*visible.shape[:2], 1))], -1)
        values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
    any_visible = visible.any(-1, keepdim=True)
    # Rows that see nothing keep their scores until the end: a softmax over nothing has no gradient.
    masked = scores.masked_fill(~visible & any_visible, -math.inf)
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:2], values.shape[-1])), scores.new_full(scores.shape[:2], -math.inf)
    lse = masked.logsumexp(-1)
    out = _mixed((masked - lse[..., None]).exp(), values, visible)
    return torch.where(any_visible, out, 0.0), torch.where(any_visible[..., 0], lse, -math.inf)


def _mixed(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Weights (n, H, m), 0 where not visible, times values (m, H, D): (n, H, D)."""
    if values.isfinite().all():
        return torch.einsum("nhm,mhd->nhd", weights, values)
    # 0 times NaN is NaN: what a query does not see must not be in its product.
    seen = visible.transpose(1, 2).unsqueeze(-1)
    return torch.stack([torch.einsum("hm,mhd->hd", row, values.masked_fill(~own, 0)) for row, own in zip(weights, seen, strict=True)])


def _per_key(gate: Tensor, sequence: Sequence, query: Tensor, num_keys: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Gates of blocks (n, K, NB) as those of their keys (n, H, m), and which keys are not after a query (n, 1, m)."""
    causal = torch.arange(num_keys, device=query.device) <= positions(sequence, query.device)[:, None]
    return _per_query_head(gate.repeat_interleave(block_size, -1)[..., :num_keys], query.shape[1]), causal[:, None]


def gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    sequence: Sequence,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention with log_gate (n, K, NB) added to the scores of each block; -inf leaves a block out."""
    bias, causal = _per_key(log_gate, sequence, query, key.shape[0], block_size)
    visible = causal & (bias > -math.inf)
    return attend(scores_of(query, key, scale, softcap) + torch.where(visible, bias, 0.0), visible, value, sinks)


def gated_by_factor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    sequence: Sequence,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with the gate as a factor, the form of the definition: gate * exp(score)."""
    factor, causal = _per_key(gate, sequence, query, key.shape[0], block_size)
    visible = causal & (factor > 0)
    scores = scores_of(query, key, scale, softcap)
    top = scores.detach().masked_fill(~visible, -math.inf).amax(-1, keepdim=True) if len(key) else scores.new_zeros((*scores.shape[:2], 1))
    weight = torch.where(visible, factor * (scores - torch.where(top.isfinite(), top, 0.0)).masked_fill(~visible, 0.0).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double()[:, None] - torch.where(top.isfinite(), top, 0.0)).exp()
    mixed = _mixed(weight, _per_query_head(value, query.shape[1]), visible)
    return torch.where(total > 0, mixed / torch.where(total > 0, total, 1.0), 0.0)
