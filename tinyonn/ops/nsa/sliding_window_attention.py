"""`sliding_window_attention`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ... import reference
from .._dispatch import check_impl, parts_of, register, schema_of, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_keys,
    check_query,
    check_window,
    checked_bounds,
    choose_nsa_impl,
    in_dtypes_of,
    in_one_dtype,
    like_inputs,
    refuse_tangents,
    scale_of,
)
from ._torch_nsa import spans_of, window_backward, window_forward
from ._tuples import QueryKeyValue


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of token t to keys j with 0 <= t - j < window.

    Tensors are (B, T, H, D). Differentiable: query, key, value.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        window: keys that a query sees, its own included.
        scale, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        (B, T, H, D), 0 where nothing is visible.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    check_impl(impl)
    query, key, value = in_one_dtype(query, key, value)
    check_query(query)
    check_keys(query, "key", key, "value", value)
    check_window(window)
    bounds = checked_bounds(query, key, key.shape[1], cu_seqlens, key_start, key_end)
    scale = scale_of(query, scale)
    if impl == "reference":
        check_bound_values(key.shape[1], bounds)
        return reference.sliding_window_attention(query, key, value, window, scale=scale, **bounds._asdict()).to(query.dtype)
    refuse_tangents("sliding_window_attention", query, key, value)
    out: Tensor = _forward_op(query, key, value, window, scale, *bounds, impl)[0]
    return out


class Options(NamedTuple):
    window: int
    scale: float


class Statistics(NamedTuple):
    lse: Tensor
    grad_out: Tensor


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """out, and lse for backward."""
    inputs, options, bounds, impl = parts_of(arguments, QueryKeyValue, Options, Bounds)
    num_keys = inputs.key.shape[1]
    check_bound_values(num_keys, bounds)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        return _triton_nsa.window_forward(*inputs, *options, bounds)
    return window_forward(*inputs, spans_of(inputs.query, num_keys, 1, *bounds), *options)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (lse, grad_out), options, bounds, impl = parts_of(arguments, QueryKeyValue, Statistics, Options, Bounds)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.window_backward(*inputs, lse, grad_out, *options, bounds)
    else:
        spans = spans_of(inputs.query, inputs.key.shape[1], 1, *bounds)
        grads = window_backward(*inputs, lse, grad_out, None, spans, *options)[:3]
    return in_dtypes_of(inputs, grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, bounds, ctx.impl = parts_of(inputs, QueryKeyValue, Options, Bounds)
    ctx.save_for_backward(*tensors, output[1], *bounds)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("sliding_window_attention", grad_out)
    tensors, lse, *bounds = parts_of(ctx.saved_tensors, QueryKeyValue)
    return *_backward_op(*tensors, lse, grad_out, *ctx.options, *bounds, ctx.impl), *([None] * 6)


_forward_op = register("sliding_window_attention", _forward, _fake, schema_of(QueryKeyValue, Options, Bounds, returns=2))
_backward_op = register(
    "sliding_window_attention_backward", _backward, like_inputs, schema_of(QueryKeyValue, Statistics, Options, Bounds, returns=3)
)
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
