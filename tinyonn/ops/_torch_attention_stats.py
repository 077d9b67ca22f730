"""Attention statistics in plain torch: a chunk of queries against the keys they can see, whose scores stay in the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import statistics_dtype, without_autocast
from ._torch_nsa import grouped_rows, heads_first

CHUNK_ELEMENTS = 1 << 20  # scores at a time: 4 MiB, so that the work of a step outweighs its start
HIDDEN = -1e30  # finite, so that 0 times it is 0


class Visibility(NamedTuple):
    """Which keys a query sees, and what is added to their scores.

    Attributes:
        causal: none after it.
        window: none `window` or more before it; 0 for any.
        key_mask: (B, Tk) bool.
        bias: (B or 1, H or 1, T or 1, Tk or 1), bool or added to the scores.
    """

    causal: bool
    window: int
    key_mask: Tensor | None
    bias: Tensor | None


@without_autocast
def attention_stats(
    query: Tensor, key: Tensor, span_mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """entropy and span mass (B, T, H), the mass empty without a span; softcap 0 for none."""
    dtype = statistics_dtype(query.dtype)
    batch, queries, heads, _ = query.shape
    keys, num_kv = key.shape[1:3]
    entropy = torch.zeros((batch, queries, heads), dtype=dtype, device=query.device)
    mass = torch.zeros_like(entropy) if span_mask is not None else entropy.new_empty(0)
    before = keys - queries
    for row in range(batch):
        k = heads_first(key[row], dtype)
        for head in range(num_kv):
            own = slice(head * heads // num_kv, (head + 1) * heads // num_kv)
            size = max(1, min(64, CHUNK_ELEMENTS // max(1, keys * heads // num_kv)))
            for begin in range(0, queries, size):
                end = min(begin + size, queries)
                low = max(0, before + begin + 1 - visibility.window) if visibility.window else 0
                high = before + end if visibility.causal else keys
                if high <= low:
                    continue
                scores = grouped_rows(query[row, begin:end, own] * scale, 1, dtype)[0] @ k[head, low:high].T
                scores = scores.view(-1, end - begin, high - low)
                if softcap:
                    scores.div_(softcap).tanh_().mul_(softcap)
                _hide(scores, visibility, row, own, slice(begin, end), slice(low, high), before)
                sink = None if sinks is None else sinks[own].to(dtype).unsqueeze(-1)
                span = None if span_mask is None else span_mask[row, low:high].to(dtype)
                found, share = _statistics(scores, sink, span)
                entropy[row, begin:end, own] = found.T
                if share is not None:
                    mass[row, begin:end, own] = share.T
    return entropy, mass


def _hide(scores: Tensor, visibility: Visibility, row: int, heads: slice, queries: slice, keys: slice, before: int) -> None:
    """Adds the bias, and lowers what a query does not see to HIDDEN; `scores` is (G, n, m)."""
    first, last = before + queries.start, before + queries.stop - 1
    place = torch.arange(first, last + 1, device=scores.device)[:, None]
    if visibility.bias is not None:
        bias = visibility.bias
        part = bias[row if bias.shape[0] > 1 else 0]
        for dim, (size, index) in enumerate(zip(part.shape, (heads, queries, keys), strict=True)):
            part = part.narrow(dim, index.start, index.stop - index.start) if size > 1 else part
        if bias.dtype == torch.bool:
            scores.masked_fill_(~part, HIDDEN)
        else:
            scores.add_(part.to(scores.dtype)).clamp_(min=HIDDEN)
    if visibility.key_mask is not None:
        scores.masked_fill_(~visibility.key_mask[row, keys], HIDDEN)
    if visibility.causal and keys.stop > first + 1:
        after = slice(max(0, first + 1 - keys.start), None)
        position = torch.arange(keys.start, keys.stop, device=scores.device)[after]
        scores[..., after].masked_fill_(position > place, HIDDEN)
    if visibility.window and keys.start <= last - visibility.window:
        early = slice(0, last - visibility.window + 1 - keys.start)
        position = torch.arange(keys.start, keys.stop, device=scores.device)[early]
        scores[..., early].masked_fill_(position <= place - visibility.window, HIDDEN)


def _statistics(scores: Tensor, sink: Tensor | None, span: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """entropy and span mass (G, n) of scores (G, n, m), which are overwritten; a sink (G, 1) takes its share and gives nothing."""
    top = scores.amax(-1)
    seen = ~(top <= HIDDEN)
    top = top if sink is None else torch.maximum(top, sink)
    scores.sub_(top.unsqueeze(-1))
    weights = scores.exp()
    total = weights.sum(-1)
    whole = total if sink is None else total + (sink - top).exp()
    entropy = (whole.log() * total - scores.mul_(weights).sum(-1)) / whole
    mass = None if span is None else torch.where(seen, (weights @ span) / whole, 0)
    return torch.where(seen, entropy.clamp(min=0), 0), mass
