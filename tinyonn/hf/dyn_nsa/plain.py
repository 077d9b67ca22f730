"""Attention of the layers that a conversion leaves as they are: layers with sliding windows or chunks, and full ones that were not chosen.

SDPA runs them. It knows neither softcaps nor sinks; layers with one of these compute every score, as transformers' eager attention does.

B batch, T queries of Tk keys, H query heads, K key/value heads, D head dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import InputError
from ...ops._checks import check_number


class ScoreShape(NamedTuple):
    """What a model does to its scores beyond scaling them."""

    softcap: float | None = None  # bound of the scores, softcap · tanh(score / softcap)
    sinks: Tensor | None = None  # (H,), score of each head's additional key, whose value is 0


def checked_shape(name: str, heads: int, softcap: object, sinks: object) -> ScoreShape:
    """A softcap and sinks as a model passes them to its attention function.

    Args:
        name: the attention module, for errors.

    Raises:
        InputError: the softcap is not a number above 0; the sinks are not (H,).
    """
    if softcap is not None:
        try:
            check_number("softcap", softcap, above=0)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} passes a softcap that DynNSA does not support: {error}") from error
    if sinks is not None and (not isinstance(sinks, Tensor) or tuple(sinks.shape) != (heads,)):
        got = tuple(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise InputError(f"{name} passes sinks (s_aux) that DynNSA does not support: they must be ({heads},), one per head, got {got}.")
    return ScoreShape(softcap, sinks)  # type: ignore[arg-type]


def plain_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shape: ScoreShape,
    *,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
) -> Tensor:
    """Attention to every key of a mask, (B, T, H, D).

    Args:
        query: (B, H, T, D). key, value: (B, K, Tk, D).
        mask: bool, or additive; None for causal attention, or attention to all keys by a single query.
    """
    if shape.softcap is None and shape.sinks is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal)[0]
        return out
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a query of padding sees no key
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if shape.sinks is not None:
        sink = shape.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    shares = torch.softmax(scores, -1).to(value.dtype)[..., : key.shape[2]]
    shares = nn.functional.dropout(shares, dropout, module.training)
    return torch.matmul(shares, value).transpose(1, 2).contiguous()


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, T, Tk) bool: the queries are the last T positions."""
    place = torch.arange(keys, device=device)
    return (place <= place[keys - queries :, None])[None, None]


def mask_of_bounds(query: Tensor, key: Tensor, rows: list[Tensor] | None, sequences: Tensor | None) -> Tensor | None:
    """The bool mask of padded or packed rows, (B, 1, T, Tk); None where there is neither.

    Args:
        query: (B, H, T, D). key: (B, K, Tk, D); the last key belongs to the last query.
        rows: first key of each row and one past its last, (B,) each.
        sequences: (sequences + 1,), bounds of the sequences packed in the rows, which count as one after the other.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if sequences is None and rows is None:
        return None if queries in (1, keys) else causal_mask(queries, keys, key.device)
    causal = causal_mask(queries, keys, key.device)
    if sequences is not None:
        place = torch.arange(batch * keys, device=key.device)
        own = torch.searchsorted(sequences.long(), place, right=True).view(batch, 1, keys)
        return causal & (own[..., None] == own[..., None, :])
    assert rows is not None
    start, end = rows
    place = torch.arange(keys, device=key.device)
    return causal & ((place >= start[:, None]) & (place < end[:, None]))[:, None, None]
