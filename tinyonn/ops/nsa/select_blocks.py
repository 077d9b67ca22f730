"""`select_blocks`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from .._dispatch import check_impl, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_keys,
    check_max_blocks,
    check_query,
    check_shape,
    check_sizes,
    check_temperature,
    checked_bounds,
    choose_nsa_impl,
    in_one_dtype,
    refuse_tangents,
    scale_of,
)
from ._torch_nsa import spans_of
from ._torch_select import select_backward, select_forward


class BlockSelection(NamedTuple):
    """Which key blocks each query reads, and how strongly.

    Attributes:
        indices: (B, T, K, max_blocks) int32, ascending, counted from the start of the query's sequence; -1 behind the last.
        counts: (B, T, K) int32.
        bias: (B, T, K, max_blocks) float32 (float64 for float64), log of the gate, 0 for forced blocks and behind the last.
        soft_counts: (B, T, K) like bias, the forced blocks plus, for every other past block, sigmoid((z - threshold) / temperature).
        overflow: 0-d like bias, share of (token, head) rows for which more than max_blocks passed; padding does not count.
    """

    indices: Tensor
    counts: Tensor
    bias: Tensor
    soft_counts: Tensor
    overflow: Tensor


def select_blocks(
    query: Tensor,
    key_compressed: Tensor,
    lse: Tensor,
    threshold: Tensor,
    *,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    detach_scores: bool = False,
    num_keys: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> BlockSelection:
    """Key blocks whose importance passes a threshold.

    z[t, b] = log(mean over the group's heads of a block's share of the compressed attention · the share's inverse if it were uniform),
    at least -20; c = clamp((z - threshold) / temperature, 0, 1); gate = c²(3 - 2c), a smoothstep: exactly 0 at and below the threshold.
    Selected are the past blocks with a gate above 0, and the first, the previous and the own block, whose gate is 1. Where more than
    max_blocks pass, those with the highest z stay, ties to the lower index.

    Differentiable: threshold and, unless detach_scores, query, key_compressed and lse; bias and soft_counts carry gradients.

    Args:
        query: (B, T, H, D), the last T of `num_keys` positions.
        key_compressed, lse: what `compressed_attention` took and gave, (B, M, K, D) and (B, T, H).
        threshold: (B, T, K), in nats.
        temperature: width of the gate's slope, in nats; a normal float32.
        block_size: positions of a key block, a power of two of at least 16.
        compress_size: positions of a compressed key, a divisor of block_size.
        max_blocks: most blocks of a row, at least 3.
        detach_scores: no gradient through z into query, key_compressed and lse.
        num_keys, scale, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    check_impl(impl)
    query, key_compressed = in_one_dtype(query, key_compressed)
    check_query(query)
    check_keys(query, "key_compressed", key_compressed, "", None)
    check_sizes(block_size, compress_size)
    check_max_blocks(max_blocks)
    temperature = check_temperature(temperature)
    num_keys = query.shape[1] if num_keys is None else num_keys
    bounds = checked_bounds(query, key_compressed, num_keys, cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, num_keys, compress_size)
    check_shape("lse", lse, tuple(query.shape[:3]), query)
    check_shape("threshold", threshold, (*query.shape[:2], key_compressed.shape[2]), query)
    if detach_scores:
        query, key_compressed, lse = query.detach(), key_compressed.detach(), lse.detach()
    scale = scale_of(query, scale)
    if impl == "reference":
        check_bound_values(num_keys, bounds)
        indices, counts, bias, soft_counts, overflow = reference.select_blocks(
            query,
            key_compressed,
            lse,
            threshold,
            temperature=temperature,
            block_size=block_size,
            compress_size=compress_size,
            max_blocks=max_blocks,
            num_keys=num_keys,
            scale=scale,
            **bounds._asdict(),
        )
        dtype = statistics_dtype(query.dtype)
        return BlockSelection(indices, counts, bias.to(dtype), soft_counts.to(dtype), overflow.to(dtype))
    refuse_tangents("select_blocks", query, key_compressed, lse, threshold)
    options = (temperature, block_size, compress_size, max_blocks, num_keys, scale)
    return BlockSelection(*_forward(query, key_compressed, lse, threshold, *options, *bounds, impl))


@torch.library.custom_op("tinyonn::select_blocks", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens, key_start, key_end)
    check_bound_values(num_keys, bounds)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        options = (temperature, block_size, compress_size, max_blocks, num_keys, scale, bounds)
        return _triton_nsa.select_forward(query, key, lse, threshold, *options)
    spans = spans_of(query, num_keys, compress_size, *bounds)
    return select_forward(query, key, lse, threshold, spans, temperature, block_size, compress_size, max_blocks, scale)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(query.dtype)
    shape = (*query.shape[:2], key.shape[2])
    indices, counts = query.new_empty((*shape, max_blocks), dtype=torch.int32), query.new_empty(shape, dtype=torch.int32)
    return (
        indices,
        counts,
        query.new_empty((*shape, max_blocks), dtype=dtype),
        query.new_empty(shape, dtype=dtype),
        query.new_empty((), dtype=dtype),
    )


@torch.library.custom_op("tinyonn::select_blocks_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    threshold: Tensor,
    indices: Tensor,
    counts: Tensor,
    grad_bias: Tensor,
    grad_soft: Tensor,
    temperature: float,
    block_size: int,
    compress_size: int,
    num_keys: int,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scores_too: bool,
    impl: str,
) -> list[Tensor]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    bounds = Bounds(cu_seqlens, key_start, key_end)
    tensors = (query, key, lse, threshold, indices, counts, grad_bias, grad_soft)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.select_backward(*tensors, temperature, block_size, compress_size, num_keys, scale, bounds, scores_too)
    else:
        spans = spans_of(query, num_keys, compress_size, *bounds)
        grads = select_backward(*tensors, spans, temperature, block_size, compress_size, scale, scores_too)
    return [grad.to(x.dtype) for grad, x in zip(grads, (threshold, query, key, lse), strict=True) if grad is not None]


@_backward.register_fake
def _(query: Tensor, key: Tensor, lse: Tensor, threshold: Tensor, *rest: Any) -> list[Tensor]:
    *_, scores_too, _ = rest
    return [x.new_empty(x.shape) for x in ((threshold, query, key, lse) if scores_too else (threshold,))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, lse, threshold, temperature, block_size, compress_size, _, num_keys, scale, cu_seqlens, key_start, key_end, ctx.impl = (
        inputs
    )
    ctx.options = (temperature, block_size, compress_size, num_keys, scale)
    indices, counts, _, _, overflow = output
    ctx.save_for_backward(query, key, lse, threshold, indices, counts, cu_seqlens, key_start, key_end)
    ctx.mark_non_differentiable(indices, counts, overflow)


def _autograd(ctx: Any, _: Tensor, __: Tensor, grad_bias: Tensor, grad_soft: Tensor, ___: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("select_blocks", grad_bias, grad_soft)
    *saved, cu_seqlens, key_start, key_end = ctx.saved_tensors
    scores_too = any(ctx.needs_input_grad[:3])
    grad_threshold, *others = _backward(
        *saved, grad_bias, grad_soft, *ctx.options, cu_seqlens, key_start, key_end, scores_too, ctx.impl
    )  # fmt: skip
    return *(others or [None] * 3), grad_threshold, *([None] * 10)


_forward.register_autograd(_autograd, setup_context=_setup_context)
