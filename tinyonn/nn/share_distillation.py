"""The loss that keeps the compressed branch's estimate of each block's share near the true share while a model trains.

    L = weight · mean over layers, heads and some queries of Σ_b p_b log(p_b / p̂_b)

p_b is the share of a block that the query may leave out, in attention to all keys, and p̂_b its estimate from compressed keys. The other
blocks and a sink count as one more. Only compression of keys and the query map of the compressed branch get a gradient.

B batch, T queries of Tk positions, H query heads, K key/value heads, G = H / K, D head dim, M compressed keys, NB key blocks

Source: a loss on attention over all keys teaches the selection in DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops._dispatch import autocast_off
from .block_compression import block_starts

if TYPE_CHECKING:
    from .dyn_nsa import DynNSACore

LEAST_SHARE = 1e-9  # of an estimate, in a logarithm
LEAST_REST = 1e-6  # likewise, of what is not shared among the blocks that a query may leave out


class Scores(NamedTuple):
    """How an attention turns products of queries and keys into shares."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


def key_shares(query: Tensor, key: Tensor, visible: Tensor, scores: Scores) -> Tensor:
    """Share of each key in the attention of each query head, (K, G, t, n). A sink keeps what they lack of 1; without visible key all are 0.

    Args:
        query: (t, H, D). key: (n, K, D). visible: (t, n) bool.
    """
    product = torch.einsum("tkgd,nkd->kgtn", query.unflatten(1, (key.shape[1], -1)), key) * scores.scale
    if scores.softcap is not None:
        product = scores.softcap * torch.tanh(product / scores.softcap)
    product = product.masked_fill(~visible, torch.finfo(product.dtype).min)
    shares = product.softmax(-1)
    if scores.sinks is not None:
        sinks = scores.sinks.detach().to(product).view(*product.shape[:2], 1, 1)
        shares = shares * torch.sigmoid(product.logsumexp(-1, keepdim=True) - sinks)
    return shares * visible


def share_divergence(true: Tensor, found: Tensor) -> Tensor:
    """Divergence of shares of blocks from their estimates, in nats: (…, NB) -> (…). What a row lacks of 1 counts as one more share."""
    rest, rest_found = ((1 - shares.sum(-1)).clamp(min=LEAST_REST) for shares in (true, found))
    inner = torch.xlogy(true, true) - true * found.clamp(min=LEAST_SHARE).log()
    return inner.sum(-1) + rest * (rest.log() - rest_found.log())


def drawn_divergence(
    core: DynNSACore,
    query: Tensor,
    key: Tensor,
    scores: Scores,
    *,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of `share_divergence` over heads and `distil_queries` places of each row, and how many (place, head) pairs it is, 0-d each.

    One place is drawn from each of as many equal parts of a row. Padding, and queries that read every block anyway, do not count.

    Args:
        query: (B, Tk, H, D). key: (B, Tk, K, D). key_start, key_end, cu_seqlens: as in `ops.dyn_nsa`.
    """
    options, total = core.options, key.shape[1]
    size, wide = options.compress_size, torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach(), key.detach()
    place, begin, end = _places(options.distil_queries, query, key_start, key_end, cu_seqlens)
    chosen = query[torch.arange(len(query), device=query.device)[:, None], place]
    mapped = core.compressed_query(chosen)
    mapped = chosen if mapped is None else mapped
    compressed = core.compress_key(key, block_starts(total, size, key_start, cu_seqlens))
    position, number = (torch.arange(keys.shape[1], device=query.device) for keys in (key, compressed))
    blocks = -(-total // options.block_size)
    block, sums, pairs = torch.arange(blocks, device=query.device), [], []
    with autocast_off(query):
        for row in range(len(query)):
            at, first = place[row, :, None], begin[row, :, None]
            true = key_shares(chosen[row].to(wide), key[row].to(wide), (position >= first) & (position <= at), scores)
            true = _by_block(true, (position - first) // options.block_size, blocks)
            nth = number - (0 if cu_seqlens is None else first // size)  # number of a compressed key within the text
            whole = (nth >= 0) & ((nth + 1) * size <= at - first + 1)
            found = key_shares(mapped[row].to(wide), compressed[row].to(wide), whole, scores)
            found = _by_block(found, nth // (options.block_size // size), blocks)
            far = (block >= options.forced_first) & (block <= (at - first) // options.block_size - options.forced_local)
            counts = far.any(-1) & (at < end[row, :, None])[:, 0]
            sums.append(torch.where(counts, share_divergence(true * far, found * far), 0).sum())
            pairs.append(counts.sum() * query.shape[2])
    return torch.stack(sums).sum(), torch.stack(pairs).sum()


def _places(
    number: int, query: Tensor, key_start: Tensor | None, key_end: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Drawn places of each row, in order, and where the text of each begins and ends, (B, number) each."""
    batch, total = query.shape[:2]
    part = torch.arange(number, device=query.device) + torch.rand(batch, number, device=query.device)
    place = (part * (total / number)).long().clamp(max=total - 1)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        after = torch.searchsorted(bounds, place, right=True)
        return place, bounds[after - 1], bounds[after.clamp(max=len(bounds) - 1)]
    begin = torch.zeros_like(place) if key_start is None else key_start.long()[:, None].expand_as(place)
    end = torch.full_like(place, total) if key_end is None else key_end.long()[:, None].expand_as(place)
    return place, begin, end


def _by_block(shares: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Sums shares of keys, (K, G, t, n), over the blocks that they are in, (t, n): (K, G, t, blocks). Keys before a text have share 0."""
    index = block.clamp(0, blocks - 1).expand_as(shares)
    return shares.new_zeros(*shares.shape[:-1], blocks).scatter_add(-1, index, shares)
