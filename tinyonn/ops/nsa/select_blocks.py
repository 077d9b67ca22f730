"""`select_blocks`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...reference import BlockSelection
from .._dispatch import check_impl, parts_of, register, schema_of, statistics_dtype
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
        found = reference.select_blocks(
            query, key_compressed, lse, threshold, temperature=temperature, block_size=block_size, compress_size=compress_size,
            max_blocks=max_blocks, num_keys=num_keys, scale=scale, **bounds._asdict(),
        )  # fmt: skip
        dtype = statistics_dtype(query.dtype)
        return found._replace(**{name: getattr(found, name).to(dtype) for name in ("bias", "soft_counts", "overflow")})
    refuse_tangents("select_blocks", query, key_compressed, lse, threshold)
    options = Options(temperature, block_size, compress_size, max_blocks, num_keys, scale)
    return BlockSelection(*_forward_op(query, key_compressed, lse, threshold, *options, *bounds, impl))


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    lse: Tensor
    threshold: Tensor


class Options(NamedTuple):
    temperature: float
    block_size: int
    compress_size: int
    max_blocks: int
    num_keys: int
    scale: float


class Statistics(NamedTuple):
    indices: Tensor
    counts: Tensor
    grad_bias: Tensor
    grad_soft: Tensor


class Wanted(NamedTuple):
    scores_too: bool


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, bounds, impl = parts_of(arguments, Inputs, Options, Bounds)
    temperature, block_size, compress_size, max_blocks, num_keys, scale = options
    check_bound_values(num_keys, bounds)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        return _triton_nsa.select_forward(*inputs, temperature, block_size, compress_size, max_blocks, num_keys, scale, bounds)
    spans = spans_of(inputs.query, num_keys, compress_size, *bounds)
    return select_forward(*inputs, spans, temperature, block_size, compress_size, max_blocks, scale)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    (query, key, *_), options, *_ = parts_of(arguments, Inputs, Options)
    dtype = statistics_dtype(query.dtype)
    rows = (*query.shape[:2], key.shape[2])
    return (
        query.new_empty((*rows, options.max_blocks), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
        query.new_empty((*rows, options.max_blocks), dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty((), dtype=dtype),
    )


def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    inputs, given, options, (scores_too,), bounds, impl = parts_of(arguments, Inputs, Statistics, Options, Wanted, Bounds)
    temperature, block_size, compress_size, _, num_keys, scale = options
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.select_backward(*inputs, *given, temperature, block_size, compress_size, num_keys, scale, bounds, scores_too)
    else:
        spans = spans_of(inputs.query, num_keys, compress_size, *bounds)
        grads = select_backward(*inputs, *given, spans, temperature, block_size, compress_size, scale, scores_too)
    query, key, lse, threshold = inputs
    return [grad.to(x.dtype) for grad, x in zip(grads, (threshold, query, key, lse), strict=True) if grad is not None]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    (query, key, lse, threshold), _, _, (scores_too,), *_ = parts_of(arguments, Inputs, Statistics, Options, Wanted)
    return [x.new_empty(x.shape) for x in ((threshold, query, key, lse) if scores_too else (threshold,))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, bounds, ctx.impl = parts_of(inputs, Inputs, Options, Bounds)
    indices, counts, _, _, overflow = output
    ctx.save_for_backward(*tensors, indices, counts, *bounds)
    ctx.mark_non_differentiable(indices, counts, overflow)


def _autograd(ctx: Any, _: Tensor, __: Tensor, grad_bias: Tensor, grad_soft: Tensor, ___: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("select_blocks", grad_bias, grad_soft)
    tensors, indices, counts, *bounds = parts_of(ctx.saved_tensors, Inputs)
    wanted = Wanted(any(ctx.needs_input_grad[:3]))
    grad_threshold, *others = _backward_op(
        *tensors, indices, counts, grad_bias, grad_soft, *ctx.options, *wanted, *bounds, ctx.impl
    )  # fmt: skip
    return *(others or [None] * 3), grad_threshold, *([None] * 10)


_forward_op = register("select_blocks", _forward, _fake, schema_of(Inputs, Options, Bounds, returns=5))
_backward_op = register(
    "select_blocks_backward", _backward, _fake_backward, schema_of(Inputs, Statistics, Options, Wanted, Bounds, returns="Tensor[]")
)
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
