"""Attention statistics in plain torch: one chunk of queries at a time against its visible keys, so that scores stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast

CHUNK_ELEMENTS = 1 << 21  # scores per step: 8 MiB, large enough that the overhead of a step does not matter
MOST_QUERIES = 64  # queries per step: under a causal mask, half of the square of queries and their own keys is wasted
HIDDEN = -1e30  # finite, so that its product with 0 is 0


class Visibility(NamedTuple):
    """Keys that a query sees, and the bias of their scores.

    Attributes:
        causal: whether keys after the query are hidden.
        window: keys `window` or more positions before the query are hidden; 0 for no window.
        key_mask: (B, Tk) bool, False for hidden keys.
        bias: (B or 1, H or 1, T or 1, Tk or 1), bool, or floats that are added to the scores.
    """

    causal: bool
    window: int
    key_mask: Tensor | None
    bias: Tensor | None


@without_autocast
def attention_stats(
    query: Tensor, key: Tensor, span_mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """entropy and span mass (B, T, H); the mass is empty without a span. softcap: 0 for none."""
    dtype = statistics_dtype(query.dtype)
    batch, queries, heads, _ = query.shape
    keys, num_kv = key.shape[1:3]
    group = heads // num_kv
    entropy = torch.zeros((batch, queries, heads), dtype=dtype, device=query.device)
    mass = torch.zeros_like(entropy) if span_mask is not None else entropy.new_empty(0)
    before = keys - queries
    size = max(1, min(MOST_QUERIES, queries, CHUNK_ELEMENTS // max(1, keys * group)))
    for rows, kv in _steps(batch, num_kv, group * size * keys):
        own = slice(kv.start * group, kv.stop * group)
        k = key[rows, :, kv].to(dtype).transpose(1, 2).contiguous()
        q = (query[rows, :, own].to(dtype) * scale).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)  # (b, K, G, T, D)
        sink = None if sinks is None else sinks[own].to(dtype).view(-1, group, 1)
        for begin in range(0, queries, size):
            end = min(begin + size, queries)
            low = max(0, before + begin + 1 - visibility.window) if visibility.window else 0
            high = before + end if visibility.causal else keys
            if high <= low:
                continue
            scores = q[:, :, :, begin:end].flatten(2, 3) @ k[:, :, low:high].mT
            scores = scores.unflatten(2, (group, -1))
            if softcap:
                scores.div_(softcap).tanh_().mul_(softcap)
            _hide(scores, visibility, rows, own, slice(begin, end), slice(low, high), before)
            span = None if span_mask is None else span_mask[rows, low:high].to(dtype)
            found, share = _statistics(scores, sink, span)
            entropy[rows, begin:end, own] = found.flatten(1, 2).mT
            if share is not None:
                mass[rows, begin:end, own] = share.flatten(1, 2).mT
    return entropy, mass


def _steps(batch: int, num_kv: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Several batch rows with all of their key heads, or several key heads of one row, with at most CHUNK_ELEMENTS scores together. One key
    head of one row has `elements` scores.
    """
    together = max(1, CHUNK_ELEMENTS // max(1, elements))
    row_step, head_step = max(1, together // num_kv), min(num_kv, together)
    for row in range(0, batch, row_step):
        for head in range(0, num_kv, head_step):
            yield slice(row, min(row + row_step, batch)), slice(head, min(head + head_step, num_kv))


def _hide(scores: Tensor, visibility: Visibility, rows: slice, heads: slice, queries: slice, keys: slice, before: int) -> None:
    """Adds the bias to the scores (b, K, G, n, m), in place, and sets the scores of hidden keys to HIDDEN."""
    first, last = before + queries.start, before + queries.stop - 1
    place = torch.arange(first, last + 1, device=scores.device)[:, None]
    if visibility.bias is not None:
        part = visibility.bias
        for dim, (size, index) in enumerate(zip(part.shape, (rows, heads, queries, keys), strict=True)):
            part = part.narrow(dim, index.start, index.stop - index.start) if size > 1 else part
        part = part.unflatten(1, (-1, scores.shape[2])) if part.shape[1] > 1 else part.unsqueeze(1)
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, HIDDEN)
        else:
            scores.add_(part.to(scores.dtype)).clamp_(min=HIDDEN)
    if visibility.key_mask is not None:
        scores.masked_fill_(~visibility.key_mask[rows, None, None, None, keys], HIDDEN)
    if visibility.causal and keys.stop > first + 1:
        after = slice(max(0, first + 1 - keys.start), None)
        position = torch.arange(keys.start, keys.stop, device=scores.device)[after]
        scores[..., after].masked_fill_(position > place, HIDDEN)
    if visibility.window and keys.start <= last - visibility.window:
        early = slice(0, last - visibility.window + 1 - keys.start)
        position = torch.arange(keys.start, keys.stop, device=scores.device)[early]
        scores[..., early].masked_fill_(position <= place - visibility.window, HIDDEN)


def _statistics(scores: Tensor, sink: Tensor | None, span: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """entropy and span mass (b, K, G, n) of scores (b, K, G, n, m), which are overwritten. A sink is (K, G, 1)."""
    top = scores.amax(-1)
    seen = ~(top <= HIDDEN)
    top = top if sink is None else torch.maximum(top, sink)
    scores.sub_(top.unsqueeze(-1))
    weights = scores.exp()
    total = weights.sum(-1)
    whole = total if sink is None else total + (sink - top).exp()
    entropy = (whole.log() * total - scores.mul_(weights).sum(-1)) / whole
    mass = None
    if span is not None:
        mass = torch.where(seen, (weights.flatten(1, 3) @ span.unsqueeze(-1)).view_as(whole) / whole, 0)
    return torch.where(seen, entropy.clamp(min=0), 0), mass
