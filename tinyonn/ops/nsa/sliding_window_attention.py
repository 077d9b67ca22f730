"""`sliding_window_attention`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from .._dispatch import check_impl, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_keys,
    check_query,
    check_window,
    checked_bounds,
    choose_nsa_impl,
    in_one_dtype,
    refuse_tangents,
    scale_of,
)
from ._torch_nsa import spans_of, window_backward, window_forward


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
    out: Tensor = _forward(query, key, value, window, scale, *bounds, impl)[0]
    return out


@torch.library.custom_op("tinyonn::sliding_window_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out, and lse for the backward."""
    bounds = Bounds(cu_seqlens, key_start, key_end)
    check_bound_values(key.shape[1], bounds)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        return _triton_nsa.window_forward(query, key, value, window, scale, bounds)
    return window_forward(query, key, value, spans_of(query, key.shape[1], 1, *bounds), window, scale)


@_forward.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))


@torch.library.custom_op("tinyonn::sliding_window_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    window: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens, key_start, key_end)
    inputs = (query, key, value)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.window_backward(query, key, value, lse, grad_out, window, scale, bounds)
    else:
        spans = spans_of(query, key.shape[1], 1, *bounds)
        grads = window_backward(query, key, value, lse, grad_out, None, spans, window, scale)[:3]
    grad_query, grad_key, grad_value = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return grad_query, grad_key, grad_value


@_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.window, ctx.scale, cu_seqlens, key_start, key_end, ctx.impl = inputs
    ctx.save_for_backward(query, key, value, output[1], cu_seqlens, key_start, key_end)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("sliding_window_attention", grad_out)
    *saved, cu_seqlens, key_start, key_end = ctx.saved_tensors
    return *_backward(*saved, grad_out, ctx.window, ctx.scale, cu_seqlens, key_start, key_end, ctx.impl), *([None] * 6)


_forward.register_autograd(_autograd, setup_context=_setup_context)
