"""`compressed_attention`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from .._dispatch import check_impl, parts_of, register, schema_of, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_keys,
    check_query,
    check_sizes,
    checked_bounds,
    choose_nsa_impl,
    in_dtypes_of,
    in_one_dtype,
    like_inputs,
    refuse_tangents,
    scale_of,
)
from ._torch_nsa import compressed_backward, compressed_forward, spans_of
from ._tuples import QueryKeyValue


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
    out, lse, entropy = _forward_op(query, key_compressed, value_compressed, compress_size, num_keys, scale_of(query, scale), *bounds, impl)
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


class Options(NamedTuple):
    compress_size: int
    num_keys: int
    scale: float


class Statistics(NamedTuple):
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, bounds, impl = parts_of(arguments, QueryKeyValue, Options, Bounds)
    check_bound_values(options.num_keys, bounds)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        return _triton_nsa.compressed_forward(*inputs, *options, bounds)
    spans = spans_of(inputs.query, options.num_keys, options.compress_size, *bounds)
    return compressed_forward(*inputs, spans, options.compress_size, options.scale)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), lse, torch.empty_like(lse)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (lse, grad_out, grad_lse), options, bounds, impl = parts_of(arguments, QueryKeyValue, Statistics, Options, Bounds)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.compressed_backward(*inputs, lse, grad_out, grad_lse, *options, bounds)
    else:
        spans = spans_of(inputs.query, options.num_keys, options.compress_size, *bounds)
        grads = compressed_backward(*inputs, lse, grad_out, None, grad_lse, spans, options.compress_size, options.scale)[:3]
    return in_dtypes_of(inputs, grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, bounds, ctx.impl = parts_of(inputs, QueryKeyValue, Options, Bounds)
    _, lse, entropy = output
    ctx.save_for_backward(*tensors, lse, *bounds)
    ctx.mark_non_differentiable(entropy)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("compressed_attention", grad_out, grad_lse)
    tensors, lse, *bounds = parts_of(ctx.saved_tensors, QueryKeyValue)
    return *_backward_op(*tensors, lse, grad_out, grad_lse, *ctx.options, *bounds, ctx.impl), *([None] * 7)


_forward_op = register("compressed_attention", _forward, _fake, schema_of(QueryKeyValue, Options, Bounds, returns=3))
_backward_op = register(
    "compressed_attention_backward", _backward, like_inputs, schema_of(QueryKeyValue, Statistics, Options, Bounds, returns=3)
)
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
