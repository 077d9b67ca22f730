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

if TYPE_CHECKING:
    from .dyn_nsa import DynNSACore

LEAST_SHARE = 1e-9  # lower bound of an estimated share before the logarithm
LEAST_REST = 1e-6  # the same for the remaining share
ELEMENTS = 2**23  # of the largest tensor of some queries


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
    query, key = query.detach(), key.detach()
    drawn, place = _drawn(options.distil_queries, query, total)
    begin, end = _bounds(place, total, key_start, key_end, cu_seqlens)
    chosen = query[torch.arange(len(query), device=query.device)[:, None], drawn]
    mapped = core.compressed_query(chosen)
    mapped = chosen if mapped is None else mapped
    compressed = core.compress_key(key, block_starts(total, options.compress_size, key_start, cu_seqlens))
    sums, pairs = [], []
    each = max(1, ELEMENTS // (query.shape[2] * max(1, total)))
    with autocast_off(query):
        for row in range(len(query)):
            for part in torch.arange(place.shape[1], device=place.device).split(each):
                at, first = place[row, part], begin[row, part]
                queries = chosen[row, part].to(wide), mapped[row, part].to(wide)
                keys = key[row].to(wide), compressed[row].to(wide)
                target, estimate = _shares(core, queries, keys, at, first, scores, packed=cu_seqlens is not None)
                far, _ = kinds_of_blocks(at - first, total, options)
                counts = far.any(-1) & (at < end[row, part])
                sums.append(torch.where(counts, share_divergence(target * far, estimate * far), 0).sum())
                pairs.append(counts.sum() * query.shape[2])
    return torch.stack(sums).sum(), torch.stack(pairs).sum()


def _shares(
    core: DynNSACore,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    at: Tensor,
    first: Tensor,
    scores: Scores,
    *,
    packed: bool,
) -> tuple[Tensor, Tensor]:
    """True and estimated share of each block of the queries' texts, (K, G, t, NB) each.

    Args:
        queries: (t, H, D), as they are and as the compressed branch has them. keys: (Tk, K, D) and (M, K, D), the compressed ones.
        at: (t,), positions of the queries. first: (t,), positions at which their texts begin; the same for all without `packed`.
    """
    options, total, size = core.options, len(keys[0]), core.options.compress_size
    position = torch.arange(total, device=at.device)
    if not packed:
        with torch.no_grad():
            own = keys[0][(position + first[:1]).clamp(max=total - 1)]
            target = by_block(key_shares(queries[0], own, position <= (at - first)[:, None], scores), options.block_size, total, options)
        return target, block_shares(queries[1], keys[1], at - first, total, options, scores)
    at, first = at[:, None], first[:, None]
    with torch.no_grad():
        target = key_shares(queries[0], keys[0], (position >= first) & (position <= at), scores)
        target = _scattered(target, (position - first) // options.block_size, total, options.block_size)
    nth = torch.arange(len(keys[1]), device=at.device) - first // size  # number of a compressed key within the text
    estimate = key_shares(queries[1], keys[1], (nth >= 0) & ((nth + 1) * size <= at - first + 1), scores)
    return target, _scattered(estimate, nth // (options.block_size // size), total, options.block_size)


def _scattered(shares: Tensor, block: Tensor, total: int, block_size: int) -> Tensor:
    """Sums of shares, (K, G, t, n), over the blocks that the keys are in, (t, n): (K, G, t, NB). Keys before a text have share 0."""
    blocks = -(-total // block_size)
    return shares.new_zeros(*shares.shape[:-1], blocks).scatter_add(-1, block.clamp(0, blocks - 1).expand_as(shares), shares)


def _drawn(number: int, query: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Random queries of each row, in order, and their positions, (B, number) each."""
    batch, queries = query.shape[:2]
    part = torch.arange(number, device=query.device) + torch.rand(batch, number, device=query.device)
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
