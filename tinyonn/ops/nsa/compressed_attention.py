"""`compressed_attention`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from .._dispatch import check_impl, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_keys,
    check_query,
    check_sizes,
    checked_bounds,
    choose_nsa_impl,
    in_one_dtype,
    refuse_tangents,
    scale_of,
)
from ._torch_nsa import compressed_backward, compressed_forward, spans_of


def compressed_attention(
    query: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    *,
    compress_size: int,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to compressed keys, each of which stands for `compress_size` positions and is seen once all of them are past.

    Tensors are (B, T, H, D), not scaled_dot_product_attention's (B, H, T, D). Differentiable: query, key_compressed,
    value_compressed; out and lse carry gradients, entropy carries none.

    Args:
        query: (B, T, H, D), the last T of `num_keys` positions.
        key_compressed, value_compressed: (B, num_keys // compress_size, K, D), K dividing H. Key c of a row stands for positions
            c * compress_size … of its sequence, padding not counted; packed sequence i begins at row cu_seqlens[i] // compress_size.
        compress_size: 16, 32 or 64.
        num_keys: positions of a row; None for T.
        scale: of the scores; None for D ** -0.5.
        cu_seqlens: (sequences + 1,) int32 or int64, bounds of sequences packed in one row.
        key_start, key_end: (B,) int32 or int64, first position of a row's sequence, and the one behind its last.
        impl: "auto", "triton", "torch" or "reference"; an explicit choice never falls back.

    Returns:
        out: (B, T, H, D), 0 where nothing is visible.
        lse: (B, T, H) float32 (float64 for float64), logsumexp of the scores, -inf there.
        entropy: (B, T, H) like lse, in nats, 0 there.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; an input carries a forward-mode tangent, which impl="reference" alone takes.

    Source: Yuan et al., "Native sparse attention", arXiv:2502.11089.
    """
    check_impl(impl)
    query, key_compressed, value_compressed = in_one_dtype(query, key_compressed, value_compressed)
    check_query(query)
    check_keys(query, "key_compressed", key_compressed, "value_compressed", value_compressed)
    check_sizes(64, compress_size)
    num_keys = query.shape[1] if num_keys is None else num_keys
    bounds = checked_bounds(query, key_compressed, num_keys, cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, num_keys, compress_size)
    if impl == "reference":
        return _reference(query, key_compressed, value_compressed, compress_size, num_keys, scale_of(query, scale), bounds)
    refuse_tangents("compressed_attention", query, key_compressed, value_compressed)
    out, lse, entropy = _forward(query, key_compressed, value_compressed, compress_size, num_keys, scale_of(query, scale), *bounds, impl)
    return out, lse, entropy


def _reference(
    query: Tensor, key: Tensor, value: Tensor, compress_size: int, num_keys: int, scale: float, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle, in the precision of the op; its gradients are autograd's."""
    check_bound_values(num_keys, bounds)
    out, lse, entropy = reference.compressed_attention(
        query, key, value, compress_size=compress_size, num_keys=num_keys, scale=scale, **bounds._asdict()
    )
    dtype = statistics_dtype(query.dtype)
    return out.to(query.dtype), lse.to(dtype), entropy.to(dtype)


@torch.library.custom_op("tinyonn::compressed_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compress_size: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens, key_start, key_end)
    check_bound_values(num_keys, bounds)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        return _triton_nsa.compressed_forward(query, key, value, compress_size, num_keys, scale, bounds)
    return compressed_forward(query, key, value, spans_of(query, num_keys, compress_size, *bounds), compress_size, scale)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compress_size: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), lse, torch.empty_like(lse)


@torch.library.custom_op("tinyonn::compressed_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    compress_size: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens, key_start, key_end)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        options = (compress_size, num_keys, scale, bounds)
        grads = _triton_nsa.compressed_backward(query, key, value, lse, grad_out, grad_lse, *options)
    else:
        spans = spans_of(query, num_keys, compress_size, *bounds)
        grads = compressed_backward(query, key, value, lse, grad_out, None, grad_lse, spans, compress_size, scale)[:3]
    grad_query, grad_key, grad_value = (grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))
    return grad_query, grad_key, grad_value


@_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, *ctx.options, cu_seqlens, key_start, key_end, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, output[1], cu_seqlens, key_start, key_end)
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("compressed_attention", grad_out, grad_lse)
    *saved, cu_seqlens, key_start, key_end = ctx.saved_tensors
    return *_backward(*saved, grad_out, grad_lse, *ctx.options, cu_seqlens, key_start, key_end, ctx.impl), *([None] * 7)


_forward.register_autograd(_autograd, setup_context=_setup_context)
