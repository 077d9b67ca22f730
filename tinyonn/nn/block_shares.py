"""Shares of key blocks in an attention, estimated from compressed keys.

t queries, H query heads, K key/value heads, G = H / K, D head dim, n keys, M compressed keys, NB key blocks; … stands for batch dimensions
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dyn_nsa_options import DynNSAOptions


class Scores(NamedTuple):
    """How an attention turns products of queries and keys into shares."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


def key_shares(query: Tensor, key: Tensor, visible: Tensor, scores: Scores) -> Tensor:
    """Share of each key in the attention of each query head, (…, K, G, t, n); 0 without visible key. A sink keeps what they lack of 1.

    Args:
        query: (…, t, H, D). key: (…, n, K, D). visible: (…, t, n) bool.
    """
    product = torch.einsum("...tkgd,...nkd->...kgtn", query.unflatten(-2, (key.shape[-2], -1)), key) * scores.scale
    if scores.softcap is not None:
        product = scores.softcap * torch.tanh(product / scores.softcap)
    visible = visible[..., None, None, :, :]
    product = product.masked_fill(~visible, torch.finfo(product.dtype).min)
    shares = product.softmax(-1)
    if scores.sinks is not None:
        sinks = scores.sinks.detach().to(product).view(*product.shape[-4:-2], 1, 1)
        shares = shares * torch.sigmoid(product.logsumexp(-1, keepdim=True) - sinks)
    return shares * visible


def kinds_of_blocks(place: Tensor, length: int, options: DynNSAOptions) -> tuple[Tensor, Tensor]:
    """Which blocks of a sequence a query at each place may leave out, (…, t, NB), and how many it reads anyway, (…, t)."""
    own = place // options.block_size
    block = torch.arange(-(-length // options.block_size), device=place.device)
    forced = (block < options.forced_first) | (block > own[..., None] - options.forced_local)
    far = (block < own[..., None]) & ~forced
    return far, (own + 1).clamp(max=options.forced)


def block_shares(query: Tensor, keys: Tensor, place: Tensor, length: int, options: DynNSAOptions, scores: Scores) -> Tensor:
    """Estimated share of each block in the attention of each query head, (…, K, G, t, NB).

    Args:
        query: (…, t, H, D), as the compressed branch has it. keys: (…, M, K, D), compressed keys of the sequence. place: (…, t) of the
            queries.
        length: positions of the sequence.
    """
    shares = compressed_shares(query, keys[..., : length // options.compress_size, :, :], place, options, scores)
    return by_block(shares, options.block_size // options.compress_size, length, options)


def compressed_shares(query: Tensor, keys: Tensor, place: Tensor, options: DynNSAOptions, scores: Scores) -> Tensor:
    """Share of each compressed key in the attention of each query head, (…, K, G, t, M): of those that end by the query's place."""
    visible = (torch.arange(keys.shape[-3], device=place.device) + 1) * options.compress_size <= place[..., None] + 1
    return key_shares(query, keys, visible, scores)


def by_block(shares: Tensor, each: int, length: int, options: DynNSAOptions) -> Tensor:
    """Sums of shares, (…, n), over the blocks of a sequence of `length` positions, (…, NB), of `each` keys or compressed keys."""
    blocks = -(-length // options.block_size)
    return torch.nn.functional.pad(shares, (0, blocks * each - shares.shape[-1])).unflatten(-1, (blocks, each)).sum(-1)
