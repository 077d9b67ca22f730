"""`attention_stats`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from ...reference.statistics.attention_stats import AttentionStats
from .._attention import checked_heads, choose_attention_impl, scale_of
from .._checks import check_flag, check_float, check_mask, check_no_nan, check_number, check_same_device, check_size, check_tensor
from .._dispatch import register_statistic, statistics_dtype
from ._torch_attention_stats import Visibility
from ._torch_attention_stats import attention_stats as torch_attention_stats


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
    impl: str = "auto",
) -> AttentionStats:
    """Entropy of each query's attention, and its mass on a span of keys; the matrix of probabilities is never stored.

        entropy = -Σ_j p_j ln p_j = lse · Σ_j p_j - Σ_j p_j s_j,   span mass = Σ_{j in span} p_j

    The p_j sum to 1 without sinks. Tensors are (B, T, H, D), not (B, H, T, D) as in scaled_dot_product_attention. Not differentiable.

    Args:
        query: (B, T, H, D), the last T of Tk positions, with rotary embeddings applied.
        key: (B, Tk, K, D), K dividing H.
        span_mask: (B, Tk) bool, keys of the span.
        key_mask: (B, Tk) bool, False for padding.
        scale: factor of the scores; None for D ** -0.5.
        causal: whether keys after a query are hidden from it.
        window: number of positions, counted back from a query and including its own, whose keys it sees; None for all.
        softcap: bound of the scores, softcap · tanh(score / softcap), applied before the bias; None for no bound.
        sinks: (H,), an additional score of each head without a key; the probabilities of the keys then sum to less than 1.
        bias: broadcastable to (B, H, T, Tk): bool, False for hidden keys, or floats added to the scores; -1e30 and less hide a key.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        AttentionStats(entropy, span_mass), both (B, T, H) float32, or float64 for float64 inputs. entropy is in nats, 0 for a query that
        sees no key; span_mass is None without span_mask.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that is not accepted.
        RuntimeError: impl="triton" cannot run here.

    Source: entropy of heads after Clark et al., "What does BERT look at?", arXiv:1906.04341.
    """
    query, key = checked_heads(impl, query, key=key)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    if keys < queries:
        raise ValueError(f"key must have at least query's {queries} positions, got {keys}.")
    check_mask("span_mask", span_mask, (batch, keys), query.device)
    check_mask("key_mask", key_mask, (batch, keys), query.device)
    check_flag("causal", causal)
    if window is not None:
        check_size("window", window)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if sinks is not None:
        check_tensor("sinks", sinks, query.device, (heads,))
    tensors = [None if x is None else x.detach() for x in (query, key, span_mask, key_mask, sinks, _as_bias(bias, query, keys))]
    found = _attention_stats(*tensors, scale_of(query, scale), causal, window or 0, softcap or 0.0, impl)
    return AttentionStats(found[0], None if span_mask is None else found[1])


def _as_bias(bias: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """The bias with four dimensions."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.dtype != torch.bool:
        check_float("bias", bias)
    check_same_device("bias", bias, query.device)
    batch, queries, heads, _ = query.shape
    whole = (batch, heads, queries, keys)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) != 4 or any(size not in (1, wanted) for size, wanted in zip(shape, whole, strict=True)):
        raise ValueError(f"bias must be broadcastable to {whole}, got {tuple(bias.shape)}.")
    return bias.view(shape) if bias.dim() < 4 else bias


def _compute(
    query: Tensor,
    key: Tensor,
    span_mask: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """entropy and span mass; the mass is empty without a span, because a registered op has a fixed number of outputs."""
    if debug_enabled():
        check_no_nan("query", query)
        check_no_nan("key", key)
    match choose_attention_impl(impl, query):
        case "triton":
            from tinyonn_kernels.statistics.attention_stats import attention_stats_fwd

            entropy = query.new_empty(query.shape[:3], dtype=torch.float32)
            mass = torch.empty_like(entropy) if span_mask is not None else entropy.new_empty(0)
            with torch.cuda.device_of(query):
                attention_stats_fwd(query, key, entropy, mass, span_mask, key_mask, sinks, bias, scale, causal, window, softcap)
            return entropy, mass
        case "torch":
            return torch_attention_stats(query, key, span_mask, sinks, scale, softcap, Visibility(causal, window, key_mask, bias))
        case "reference":
            found = reference.attention_stats(
                query, key, span_mask=span_mask, key_mask=key_mask, scale=scale, causal=causal, window=window or None,
                softcap=softcap or None, sinks=sinks, bias=bias,
            )  # fmt: skip
            dtype = statistics_dtype(query.dtype)
            return found[0].to(dtype), query.new_empty(0, dtype=dtype) if found[1] is None else found[1].to(dtype)


def _fake(query: Tensor, key: Tensor, span_mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    entropy = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
    return entropy, entropy.new_empty(0) if span_mask is None else torch.empty_like(entropy)


_attention_stats = register_statistic("attention_stats", _compute, _fake)
