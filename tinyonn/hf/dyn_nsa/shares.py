"""Texts of a batch, and true shares of their blocks in an attention, written out for some queries.

T queries, H query heads, K key/value heads, G = H / K, D head dim, n positions of the text, NB key blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...nn.block_shares import Scores, key_shares

ELEMENTS = 2**23  # of the largest tensor of a chunk of queries
CHUNK = 128  # queries of a chunk at most: it reads no key after its last query


class Sequence(NamedTuple):
    """One text: a row without its padding, or one of several packed in a row."""

    row: int
    begin: int
    end: int
    compressed: int  # place of its first compressed key


def sequences_of(
    batch: int, total: int, compress_size: int, key_start: Tensor | None, key_end: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[Sequence]:
    """The texts of a batch of rows of `total` positions."""
    if cu_seqlens is not None:
        yield from (Sequence(0, begin, end, begin // compress_size) for begin, end in pairwise(cu_seqlens.tolist()) if end > begin)
        return
    starts = [0] * batch if key_start is None else key_start.tolist()
    ends = [total] * batch if key_end is None else key_end.tolist()
    yield from (Sequence(row, begin, end, 0) for row, (begin, end) in enumerate(zip(starts, ends, strict=True)) if end > begin)


def drawn(most: int, least: int, number: int, generator: torch.Generator) -> Tensor:
    """At most `number` of the places least … most - 1, in order."""
    return torch.randperm(most - least, generator=generator)[:number].sort().values + least


def chunks(place: Tensor, num_heads: int) -> Iterator[tuple[Tensor, int]]:
    """Parts of places in order, and one past the last position that their queries see."""
    number = max(1, min(CHUNK, ELEMENTS // max(1, num_heads * (int(place[-1]) + 1)))) if len(place) else 1
    for part in place.split(number):
        yield part, int(part[-1]) + 1


@torch.no_grad()
def true_shares(query: Tensor, key: Tensor, place: Tensor, seen: int, block_size: int, scores: Scores) -> Tensor:
    """Share of each position, by blocks, in the attention of each query head, (K, G, t, NB, block_size); 0 after the query.

    Args:
        query: (t, H, D). key: (n, K, D), of the whole text. place: (t,) of the queries. seen: positions of the text that are looked at.
    """
    blocks = -(-seen // block_size)
    shares = key_shares(query, key[:seen], torch.arange(seen, device=key.device) <= place[:, None], scores)
    return torch.nn.functional.pad(shares, (0, blocks * block_size - seen)).unflatten(-1, (blocks, block_size))


@torch.no_grad()
def true_block_shares(query: Tensor, key: Tensor, place: Tensor, block_size: int, scores: Scores) -> Tensor:
    """Share of each block in the attention of each query head, (K, G, t, NB). Arguments are as of `true_shares`; places are in order."""
    blocks, found, first = -(-key.shape[0] // block_size), [], 0
    for part, seen in chunks(place, query.shape[1]):
        shares = true_shares(query[first : first + len(part)], key, part, seen, block_size, scores).sum(-1)
        found.append(torch.nn.functional.pad(shares, (0, blocks - shares.shape[-1])))
        first += len(part)
    return torch.cat(found, 2)
