"""Entropy of each query's attention and its mass on a span of keys, from the whole matrix of probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionStats(NamedTuple):
    """Statistics of each query's attention.

    Attributes:
        entropy: (B, T, H), in nats; 0 for a query that sees no key. float32, or float64 for float64 inputs and from the reference.
        span_mass: (B, T, H) of the same dtype, probability mass on the keys of the span, 0 … 1; None without a span.
    """

    entropy: Tensor
    span_mass: Tensor | None


def attention_stats(
    query: Tensor,
    key: Tensor,
    *,
    span_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttentionStats:
    """Entropy and span mass in float64; arguments as in `ops.attention_stats`."""
    _, queries, heads, dim = query.shape
    keys, group = key.shape[1], heads // key.shape[2]
    wide = key.double().repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", query.double(), wide) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    place = torch.arange(keys - queries, keys, device=query.device)[:, None]
    position = torch.arange(keys, device=query.device)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        visible &= position <= place
    if window is not None:
        visible &= position > place - window
    visible = visible.expand(scores.shape)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        scores = scores + bias.double()
        visible = visible & (bias > -1e30)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    # A query that sees nothing has no probabilities.
    probs = torch.where(scores.amax(-1, keepdim=True) > -math.inf, scores.softmax(-1), 0)[..., :keys]
    entropy = torch.special.entr(probs).sum(-1).transpose(1, 2)
    mass = None if span_mask is None else (probs * span_mask[:, None, None]).sum(-1).transpose(1, 2)
    return AttentionStats(entropy, mass)
