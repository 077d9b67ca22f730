"""The loss that keeps the compressed branch's estimate of each block's share near the true share while a model trains.

    L = weight · mean over layers, heads and random queries of KL(p ‖ p̂) = Σ_b p_b log(p_b / p̂_b)

p_b is the share of a block that the query may leave out, in attention to all keys, and p̂_b its estimate from compressed keys. The other
blocks and a sink count as one more. Only the compression of keys and the query map of the compressed branch get the gradient.

B batch, T queries of Tk positions, H query heads, K key/value heads, D head dim, NB key blocks

Source: after the indexer loss of DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, and the distilled block gates of Gao et al., "SeerAttention",
arXiv:2410.13276. Unlike the indexer's, the target covers all keys also while the attention is sparse, each query head has its own, and the
compression has the gradient of the language loss too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops._dispatch import autocast_off
from .block_compression import block_starts
from .block_shares import Scores, block_shares, by_block, key_shares, kinds_of_blocks
from .dyn_nsa_options import DynNSAOptions

if TYPE_CHECKING:
    from .dyn_nsa import DynNSACore

LEAST_SHARE = 1e-9  # lower bound of an estimated share before the logarithm
LEAST_REST = 1e-6  # the same for the remaining share
AT_ONCE = 4  # queries of a row; their shares of all keys are the largest tensor


def share_divergence(target: Tensor, estimate: Tensor) -> Tensor:
    """KL divergence of shares of blocks from their estimates, in nats: (…, NB) -> (…). What a row lacks of 1 counts as one more share."""
    rest, estimated_rest = ((1 - shares.sum(-1)).clamp(min=LEAST_REST) for shares in (target, estimate))
    inner = torch.xlogy(target, target) - target * estimate.clamp(min=LEAST_SHARE).log()
    return inner.sum(-1) + rest * (rest.log() - estimated_rest.log())


def sampled_divergence(
    core: DynNSACore,
    query: Tensor,
    key: Tensor,
    scores: Scores,
    *,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of `share_divergence` over heads and `distil_queries` queries of each row, and how many (query, head) pairs it is, 0-d each.

    One query is drawn from each of as many equal parts of a row. Padding, and queries that read every block anyway, do not count.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key: (B, Tk, K, D).
        scores: scale, softcap and sinks of the attention.
        key_start, key_end, cu_seqlens: as in `ops.dyn_nsa`.
    """
    options, total = core.options, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.shape[0] == 0 or query.shape[1] == 0:
        return query.new_zeros((), dtype=wide), query.new_zeros((), dtype=torch.int64)
    query, key = query.detach(), key.detach()
    compressed = core.compress_key(key, block_starts(total, options.compress_size, key_start, cu_seqlens))
    row = torch.arange(query.shape[0], device=query.device)[:, None]
    if cu_seqlens is None and key_start is not None:  # keys in order from the beginning of each text
        key = key[row, (torch.arange(total, device=key.device) + key_start.long()[:, None]).clamp(max=total - 1)]
    sums, pairs = query.new_zeros((), dtype=wide), query.new_zeros((), dtype=torch.int64)
    drawn, place = _drawn(options.distil_queries, query, total)
    begin, end = _bounds(place, total, key_start, key_end, cu_seqlens)
    for part in torch.arange(options.distil_queries, device=place.device).split(AT_ONCE):
        at, first = place[:, part], begin[:, part]
        chosen = query[row, drawn[:, part]]
        mapped = core.compressed_query(chosen)
        queries = chosen.to(wide), (chosen if mapped is None else mapped).to(wide)
        with autocast_off(query):
            shares = _shares if cu_seqlens is None else _packed_shares
            target, estimate = shares(core.options, queries, (key.to(wide), compressed.to(wide)), at, first, scores)
            far, _ = kinds_of_blocks(at - first, total, options)
            counts = far.any(-1) & (at < end[:, part])
            far = far[:, None, None]
            divergence = share_divergence(target * far, estimate * far)
            sums = sums + torch.where(counts[:, None, None], divergence, 0).sum()
            pairs = pairs + counts.sum() * query.shape[2]
    return sums, pairs


def _shares(
    options: DynNSAOptions, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], at: Tensor, first: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """True and estimated share of each block of the queries' texts, (B, K, G, t, NB) each.

    Args:
        queries: (B, t, H, D), as they are and as the compressed branch has them. keys: (B, Tk, K, D) and (B, M, K, D), the compressed ones;
            both begin with the text.
        at: (B, t), positions of the queries. first: (B, t), where their texts begin.
    """
    total, place = keys[0].shape[1], at - first
    with torch.no_grad():
        visible = torch.arange(total, device=at.device) <= place[..., None]
        target = by_block(key_shares(queries[0], keys[0], visible, scores), options.block_size, total, options)
    return target, block_shares(queries[1], keys[1], place, total, options, scores)


def _packed_shares(
    options: DynNSAOptions, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], at: Tensor, first: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """As `_shares`, for texts that follow each other in a row; their blocks are added up by atomics on a GPU."""
    total, size = keys[0].shape[1], options.compress_size
    at, first = at[..., None], first[..., None]
    position = torch.arange(total, device=at.device)
    with torch.no_grad():
        target = key_shares(queries[0], keys[0], (position >= first) & (position <= at), scores)
        target = _scattered(target, (position - first) // options.block_size, total, options)
    nth = torch.arange(keys[1].shape[1], device=at.device) - first // size  # number of a compressed key within the text
    estimate = key_shares(queries[1], keys[1], (nth >= 0) & ((nth + 1) * size <= at - first + 1), scores)
    return target, _scattered(estimate, nth // (options.block_size // size), total, options)


def _scattered(shares: Tensor, block: Tensor, total: int, options: DynNSAOptions) -> Tensor:
    """Sums of shares, (B, K, G, t, n), over the blocks of their keys, (B, t, n): (B, K, G, t, NB). Keys before a text have share 0."""
    blocks = -(-total // options.block_size)
    index = block.clamp(0, blocks - 1)[:, None, None].expand_as(shares)
    return shares.new_zeros(*shares.shape[:-1], blocks).scatter_add(-1, index, shares)


def _drawn(number: int, query: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Random queries of each row, in order, and their positions, (B, number) each."""
    batch, queries = query.shape[:2]
    part = torch.arange(number, device=query.device) + torch.rand(batch, number, device=query.device, dtype=torch.float32)
    drawn = (part * (queries / number)).long().clamp(max=queries - 1)
    return drawn, drawn + (total - queries)


def _bounds(
    place: Tensor, total: int, key_start: Tensor | None, key_end: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where the text at each place begins and ends, of the shape of `place` each."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        after = torch.searchsorted(bounds, place, right=True)
        return bounds[after - 1], bounds[after.clamp(max=len(bounds) - 1)]
    begin = torch.zeros_like(place) if key_start is None else key_start.long()[:, None].expand_as(place)
    return begin, torch.full_like(place, total) if key_end is None else key_end.long()[:, None].expand_as(place)
