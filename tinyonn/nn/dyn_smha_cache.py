"""Cache of DynSMHA for decoding: each head keeps the keys and values of the tokens that used it, in pages.

B rows, n new tokens, E heads, K slots of a token, D head dim, R pairs of a token and a head
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._checks import check_int
from .dyn_nsa_cache import checked_key_start

PAGE = 32  # entries; a head of a row owns whole pages, at most one more than its pairs fill
CHUNK_ELEMENTS = 1 << 24  # keys and values that are gathered at once


class Pairs(NamedTuple):
    """New pairs of a call, by row, head and token.

    Attributes:
        row, head, token: (R,) int64; `token` counts from the start of the cache, and does not decrease within a row's head.
        key, value: (R, D).
    """

    row: Tensor
    head: Tensor
    token: Tensor
    key: Tensor
    value: Tensor


class DynSMHACache:
    """Keys and values of one layer, for decoding: per head in mode "per_head", of the one composite head in mode "composite".

    Rows have pools of one size, that of the row with the most pairs, with room to grow. A call reads a few numbers on the host.

    Args:
        key_start: (B,) int32 or int64, first position of each row that is not padding; None for 0.

    Attributes:
        length: tokens so far, padding included.

    Raises:
        TypeError: key_start has the wrong type.
    """

    def __init__(self, key_start: Tensor | None = None) -> None:
        self.key_start = checked_key_start(key_start)
        self.length = 0
        self._pages: _Pages | None = None

    @torch.no_grad()
    def append(self, rows: int, heads: int, tokens: int, pairs: Pairs) -> Tensor:
        """Adds the pairs of the next `tokens` tokens, without gradients.

        Returns:
            (R,) number of entries that each pair sees in its head: those up to its own.

        Raises:
            ValueError: the number of rows or heads, the head dim, dtype or device differs from the cache, which is not changed.
        """
        if self._pages is None:
            self.check_rows(rows)
            self._pages = _Pages(rows, heads, pairs.key)
        else:
            self._pages.check(rows, heads, pairs.key)
        seen = self._pages.append(pairs)
        self.length += tokens
        return seen

    @torch.no_grad()
    def attend(self, query: Tensor, row: Tensor, head: Tensor, seen: Tensor, scale: float) -> Tensor:
        """Attention of each pair, (R, D), to the first `seen` (R,) entries of its row's head."""
        assert self._pages is not None
        return self._pages.attend(query, row, head, seen, scale)

    def check_rows(self, rows: int) -> None:
        """ValueError if the cache has another number of rows."""
        if self.key_start is not None and tuple(self.key_start.shape) != (rows,):
            raise ValueError(f"key_start of the cache must have shape ({rows},), got {tuple(self.key_start.shape)}.")
        if self._pages is not None and self._pages.rows != rows:
            raise ValueError(f"the cache holds {self._pages.rows} row(s), got {rows}: begin another.")

    def select_rows(self, index: Tensor) -> None:
        """Replaces the rows by those of an index, (n,), which may repeat or leave out rows: for beams and batches.

        Raises:
            TypeError, ValueError: the index is no tensor of integers, or names a row that is not there. Nothing is changed.
        """
        rows = None if self._pages is None else self._pages.rows
        rows = len(self.key_start) if rows is None and self.key_start is not None else rows
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"index must be a tensor of integers, got {index.dtype if isinstance(index, Tensor) else type(index).__name__}."
            )
        if rows is not None and len(index) and not (int(index.min()) >= 0 and int(index.max()) < rows):
            raise ValueError(f"index must name rows 0 … {rows - 1}, got {index.tolist()}.")
        if self.key_start is not None:
            self.key_start = self.key_start[index.to(self.key_start.device)]
        if self._pages is not None:
            self._pages.select_rows(index)

    def crop(self, length: int) -> None:
        """Forgets all tokens from `length` on; a negative number forgets that many."""
        check_int("length", length)
        length = length if length >= 0 else max(0, self.length + length)
        if length < self.length:
            self.length = length
            if self._pages is not None:
                self._pages.crop(length)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.length, self._pages = 0, None


class _Pages:
    """Entries of (row, head), each in pages of its row's pool.

    Attributes:
        lengths: (B, E), entries.
        owned: (B, E), pages.
        used: (B,), pages of a row's pool.
        table: (B, E, P), number of each page in the row's pool.
        keys, values: (B, pages, PAGE, D), the pools.
        tokens: (B, pages, PAGE), token of each entry.
    """

    def __init__(self, rows: int, heads: int, like: Tensor) -> None:
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=like.device)

        self.rows = rows
        self.lengths, self.owned, self.used = integers(rows, heads), integers(rows, heads), integers(rows)
        self.table, self.tokens = integers(rows, heads, 0), integers(rows, 0, PAGE)
        self.keys, self.values = like.new_zeros(rows, 0, PAGE, like.shape[-1]), like.new_zeros(rows, 0, PAGE, like.shape[-1])

    def check(self, rows: int, heads: int, like: Tensor) -> None:
        held = self.keys
        if self.rows != rows or self.lengths.shape[1] != heads:
            raise ValueError(f"the cache holds {self.rows} row(s) of {self.lengths.shape[1]} heads, got {rows} of {heads}: begin another.")
        if held.shape[-1] != like.shape[-1] or held.dtype != like.dtype or held.device != like.device:
            raise ValueError(
                f"the cache holds keys of {held.shape[-1]} in {held.dtype} on {held.device}, got {like.shape[-1]} in {like.dtype} on "
                f"{like.device}: begin another."
            )

    def append(self, pairs: Pairs) -> Tensor:
        row, head = pairs.row, pairs.head
        heads = self.lengths.shape[1]
        group = row * heads + head
        counts = torch.zeros(self.rows * heads, dtype=torch.int64, device=row.device).scatter_add_(0, group, torch.ones_like(group))
        order = group.sort(stable=True).indices
        rank = torch.empty_like(group)
        rank[order] = torch.arange(len(group), device=row.device) - (counts.cumsum(0) - counts)[group[order]]
        place = self.lengths[row, head] + rank
        lengths = self.lengths + counts.view_as(self.lengths)
        wanted = torch.maximum(self.owned, -(-lengths // PAGE))
        new = wanted - self.owned
        first = self.used[:, None] + new.cumsum(1) - new  # number of each head's first new page
        used = self.used + new.sum(1)
        widest, most = (int(number) for number in torch.stack([wanted.amax(), used.amax()]).tolist()) if wanted.numel() else (0, 0)
        self._make_room(widest, most)
        page = place // PAGE
        fresh = page >= self.owned[row, head]
        number = torch.where(fresh, first[row, head] + page - self.owned[row, head], self.table[row, head, page])
        self.table[row, head, page] = number
        for pool, x in ((self.keys, pairs.key), (self.values, pairs.value), (self.tokens, pairs.token)):
            pool[row, number, place % PAGE] = x
        self.lengths, self.owned, self.used = lengths, wanted, used
        return place + 1

    def _make_room(self, widest: int, most: int) -> None:
        if widest > self.table.shape[2]:
            self.table = _longer(self.table, 2, 2 * widest)
        if most > self.keys.shape[1]:
            self.keys, self.values, self.tokens = (_longer(x, 1, most + most // 2) for x in (self.keys, self.values, self.tokens))

    def attend(self, query: Tensor, row: Tensor, head: Tensor, seen: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        longest = int(seen.amax()) if len(seen) else 0
        pages = -(-longest // PAGE)
        size = max(1, CHUNK_ELEMENTS // max(1, 2 * pages * PAGE * query.shape[-1]))
        place = torch.arange(pages * PAGE, device=query.device)
        for part in torch.arange(len(query), device=query.device).split(size):
            at = (row[part][:, None], self.table[row[part], head[part], :pages])
            keys, values = (pool[at].flatten(1, 2).to(wide) for pool in (self.keys, self.values))  # (R, pages * PAGE, D)
            unseen = place >= seen[part][:, None]
            scores = torch.einsum("rd,rpd->rp", query[part].to(wide) * scale, keys).masked_fill(unseen, -torch.inf)
            values = values.masked_fill(unseen.unsqueeze(-1), 0)  # 0 times NaN is NaN
            out[part] = torch.einsum("rp,rpd->rd", scores.softmax(-1), values).to(out.dtype)
        return out

    def select_rows(self, index: Tensor) -> None:
        self.rows = len(index)
        for name in ("lengths", "owned", "used", "table", "tokens", "keys", "values"):
            x: Tensor = getattr(self, name)
            setattr(self, name, x.index_select(0, index.to(x.device)))

    def crop(self, length: int) -> None:
        rows, heads, pages = self.table.shape
        number = self.table.flatten(1)
        tokens = self.tokens.gather(1, number[..., None].expand(-1, -1, PAGE)).view(rows, heads, pages * PAGE)
        there = torch.arange(pages * PAGE, device=tokens.device) < self.lengths[..., None]
        self.lengths = (there & (tokens < length)).sum(-1)


def _longer(x: Tensor, dim: int, size: int) -> Tensor:
    shape: list[Any] = [*x.shape]
    shape[dim] = size - x.shape[dim]
    with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
        return torch.cat([x, x.new_zeros(shape)], dim)
