"""Attention statistics of one layer, from the arguments of its attention function or from its probabilities.

B sequences, T query tokens, Tk keys (more than T after a cache), H query heads, K key heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import AttentionStats, attention_stats

CHUNK_ELEMENTS = 1 << 20  # number of probabilities converted to a wider type at a time


class Wanted(NamedTuple):
    """Selection of keys and queries for the statistics.

    Attributes:
        span_mask: (B, Tk) bool, keys of the span.
        key_mask: (B, Tk) bool, False for keys to ignore in addition to those that the model masks.
        queries: (B,) position of the only query of each row; None for all.
    """

    span_mask: Tensor | None
    key_mask: Tensor | None
    queries: Tensor | None

    def from_scores(
        self, query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, sliding: bool = False, **scores: Any
    ) -> AttentionStats:
        """Statistics of query (B, H, T, D) and key (B, K, Tk, D) with the mask of an attention function; without gradient.

        `scores`: scale, softcap and sinks of `attention_stats`.
        """
        query, key = query.detach().transpose(1, 2), key.detach().transpose(1, 2)
        batch, keys = query.shape[0], key.shape[1]
        span = _of_keys("span_mask", self.span_mask, keys, query, sliding)
        visible = _of_keys("key_mask", self.key_mask, keys, query, sliding)
        if mask is not None:
            mask = _hidden_for_good(mask.detach())
        if self.queries is not None:
            tokens = query.shape[1]
            query = self._rows(query, 1, batch)
            if mask is not None and mask.shape[2] == tokens:
                mask = self._rows(mask, 2, batch)
            if causal:
                seen = torch.arange(keys, device=query.device) <= keys - tokens + self.queries.to(query.device)[:, None]
                visible, causal = seen if visible is None else seen & visible, False
        return attention_stats(query, key, span_mask=span, key_mask=visible, causal=causal, bias=mask, **scores)

    def from_probabilities(self, probs: Tensor, mask: Tensor | None) -> AttentionStats:
        """Statistics of probs (B, H, T, Tk), computed for a few queries at a time; `mask` shows which queries attend to nothing."""
        probs = probs.detach()
        batch, heads, tokens, keys = probs.shape
        span = _of_keys("span_mask", self.span_mask, keys, probs, False)
        visible = _of_keys("key_mask", self.key_mask, keys, probs, False)
        sees = None if mask is None else _shown(mask).any(-1, keepdim=True)
        if self.queries is not None:
            probs = self._rows(probs, 2, batch)
            sees = self._rows(sees, 2, batch) if sees is not None and sees.shape[2] == tokens else sees
        dtype = torch.promote_types(probs.dtype, torch.float32)
        entropy = torch.empty(probs.shape[:3], dtype=dtype, device=probs.device)
        mass = None if span is None else torch.empty_like(entropy)
        size = max(1, CHUNK_ELEMENTS // max(1, batch * heads * keys))
        for begin in range(0, probs.shape[2], size):
            rows = slice(begin, begin + size)
            part = probs[:, :, rows].to(dtype)
            if sees is not None:
                part = part * (sees[:, :, rows] if sees.shape[2] > 1 else sees)
            if visible is not None:
                part = part * visible[:, None, None]
                part /= part.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            entropy[:, :, rows] = torch.special.entr(part).sum(-1)
            if mass is not None and span is not None:
                mass[:, :, rows] = (part @ span[:, None, :, None].to(dtype)).squeeze(-1)
        return AttentionStats(entropy.transpose(1, 2), None if mass is None else mass.transpose(1, 2))

    def _rows(self, tensor: Tensor, dim: int, batch: int) -> Tensor:
        """(B, …) with only the wanted query of each row at `dim`."""
        assert self.queries is not None
        queries, tokens = self.queries.to(tensor.device), tensor.shape[dim]
        if len(queries) != batch:
            raise ValueError(f"queries must have {batch} positions, one a row, got {len(queries)}.")
        if ((queries < 0) | (queries >= tokens)).any():
            raise ValueError(f"queries must lie between 0 and {tokens - 1}, got {queries.tolist()}.")
        rows = torch.arange(batch, device=tensor.device)
        return tensor.expand(batch, *tensor.shape[1:]).movedim(dim, 1)[rows, queries].unsqueeze(dim)


def _of_keys(name: str, mask: Tensor | None, keys: int, beside: Tensor, sliding: bool) -> Tensor | None:
    """Columns of a mask for a layer's keys, on its device. The cache of a sliding window has only the last keys."""
    if mask is None:
        return None
    if len(mask) != len(beside) or (mask.shape[1] != keys and not (sliding and mask.shape[1] > keys)):
        wanted = f"shape {(len(beside), keys)}, a column for each key, those of a cache included"
        raise ValueError(f"{name} must have {wanted}, got {tuple(mask.shape)}.")
    return mask[:, mask.shape[1] - keys :].to(beside.device)


def _shown(mask: Tensor) -> Tensor:
    """Visible positions of a mask. Additive masks hide by the lowest value of their type, others by 0."""
    additive = mask.is_floating_point() and not (mask > 0).any()
    return mask > torch.finfo(mask.dtype).min if additive else mask != 0


def _hidden_for_good(mask: Tensor) -> Tensor:
    """The mask in float32. In half precision it hides by -65504, which a large score can outweigh."""
    return mask.masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf) if mask.dtype == torch.float16 else mask
