"""`dyn_nsa`: checks, registration, dispatch; the three branches and their gates as one function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._dispatch import check_impl, check_no_nan, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_compressed,
    check_keys,
    check_max_blocks,
    check_query,
    check_shape,
    check_sizes,
    check_tau_values,
    check_temperature,
    check_window,
    checked_bounds,
    choose_nsa_impl,
    in_one_dtype,
    order_hint,
    refuse_tangents,
    scale_of,
)
from ._torch_dyn_nsa import dyn_nsa_backward, dyn_nsa_forward


class DynNSAOutput(NamedTuple):
    """What `dyn_nsa` gives.

    Attributes:
        out: (B, T, H, D).
        counts: (B, T, K) int32, key blocks read by the selected branch.
        tau: (B, T, K), the uncertainty that the threshold was made of: the caller's, or that of the compressed branch.
        overflow: 0-d, share of (token, head) rows for which more than max_blocks passed; padding does not count.
        soft_counts: (B, T, K), as in `BlockSelection`: what a budget loss pulls on.
    """

    out: Tensor
    counts: Tensor
    tau: Tensor
    overflow: Tensor
    soft_counts: Tensor


class Options(NamedTuple):
    """Numbers of a call, in the order of the registered op."""

    window: int
    temperature: float
    block_size: int
    compress_size: int
    max_blocks: int
    detach_scores: bool
    scale: float


def dyn_nsa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    *,
    tau: Tensor | None = None,
    window: int = 512,
    temperature: float = 1.0,
    block_size: int = 64,
    compress_size: int = 64,
    max_blocks: int = 32,
    detach_scores: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> DynNSAOutput:
    """Native sparse attention with a learnable, uncertainty-driven threshold in place of a fixed number of blocks.

    gates[..., 0] · compressed + gates[..., 1] · selected + gates[..., 2] · window, over one query. Selected are the blocks whose
    importance z passes base - slope · tau (`select_blocks`). The gate of a block is exactly 0 where it is not selected, so below
    max_blocks the sparse result *is* dense gated attention, and every gradient is exact for the tau that was used.

    Tensors are (B, T, H, D). Differentiable: query, key, value, key_compressed, value_compressed, gates, base, slope; out and
    soft_counts carry gradients. tau is a signal: none flows into it. Nothing reaches an earlier query, NaN and infinity included, but for
    those of a value with impl="triton", which spread over the queries of a tile.

    "All blocks" is base = -30, with a slope of at least 0, a temperature of at most 10 and max_blocks at least the number of key blocks;
    a fixed number n of blocks is the same with max_blocks = n, every longer row then counting as overflowing. At a fixed threshold the
    number of blocks can grow with the length of a sequence, since z measures against a uniform share; a loss on soft_counts holds it.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        key_compressed, value_compressed: (B, Tk // compress_size, K, D); see `compressed_attention`.
        gates: (B, T, H, 3), any reals.
        base, slope: (K,), in nats, and nats per unit of tau; a slope above 0 reads more where tau is high.
        tau: (B, T, K) in [0, 1], which `tinyonn.debug()` checks; None for the mean over a group's heads of
            entropy / log(visible compressed keys), 0 where fewer than two are.
        window: keys of the window branch.
        temperature, block_size, compress_size, max_blocks, detach_scores: as in `select_blocks`.
        scale, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.

    Source: Yuan et al., "Native sparse attention", arXiv:2502.11089, for the three branches.
    """
    check_impl(impl)
    query, key, value, key_compressed, value_compressed = in_one_dtype(query, key, value, key_compressed, value_compressed)
    check_query(query)
    check_keys(query, "key", key, "value", value)
    check_keys(query, "key_compressed", key_compressed, "value_compressed", value_compressed)
    if key_compressed.shape[2] != key.shape[2]:
        hint = order_hint(query, key)
        raise ValueError(f"key_compressed must have key's {key.shape[2]} heads, got {key_compressed.shape[2]}{hint}.")
    check_sizes(block_size, compress_size)
    check_max_blocks(max_blocks)
    check_window(window)
    bounds = checked_bounds(query, key, key.shape[1], cu_seqlens, key_start, key_end)
    check_compressed(query, key_compressed, key.shape[1], compress_size)
    rows = (*query.shape[:2], key.shape[2])
    check_shape("gates", gates, (*query.shape[:3], 3), query)
    for name, tensor in (("base", base), ("slope", slope)):
        check_shape(name, tensor, rows[2:], query)
    if tau is not None:
        check_shape("tau", tau, rows, query)
        tau = tau.detach()
    temperature, scale = check_temperature(temperature), scale_of(query, scale)
    options = Options(window, temperature, block_size, compress_size, max_blocks, detach_scores, scale)
    tensors = (query, key, value, key_compressed, value_compressed, gates, base, slope, tau)
    if debug_enabled():
        names = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope", "tau")
        for name, given in zip(names, tensors, strict=True):
            if given is not None:
                check_no_nan(name, given)
        if tau is not None:
            check_tau_values(tau)
    if impl == "reference":
        check_bound_values(key.shape[1], bounds)
        named: dict[str, Any] = {"tau": tau, **options._asdict(), **bounds._asdict()}
        inputs = (query, key, value, key_compressed, value_compressed, gates, base, slope)
        out, counts, used_tau, soft_counts, overflow = reference.dyn_nsa(*inputs, **named)
        dtype = statistics_dtype(query.dtype)
        used_tau = used_tau.to(dtype) if tau is None else tau
        return DynNSAOutput(out.to(query.dtype), counts, used_tau, overflow.to(dtype), soft_counts.to(dtype))
    refuse_tangents("dyn_nsa", *tensors)
    out, counts, own_tau, soft_counts, overflow, *_ = _forward(*tensors, *options, *bounds, impl)
    return DynNSAOutput(out, counts, own_tau if tau is None else tau, overflow, soft_counts)


@torch.library.custom_op("tinyonn::dyn_nsa", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    tau: Tensor | None,
    window: int,
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    detach_scores: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, counts, tau (empty where it was given), soft_counts, overflow; then what backward needs: the lse of the three branches,
    indices, bias, the selected branch.
    """
    bounds = Bounds(cu_seqlens, key_start, key_end)
    check_bound_values(key.shape[1], bounds)
    options = Options(window, temperature, block_size, compress_size, max_blocks, detach_scores, scale)
    tensors = (query, key, value, key_compressed, value_compressed, gates, base, slope)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_dyn_nsa

        return _triton_dyn_nsa.dyn_nsa_forward(*tensors, tau, options, bounds)
    return dyn_nsa_forward(*tensors, tau, options, bounds)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    tau: Tensor | None,
    window: int,
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    detach_scores: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(query.dtype)
    rows = (*query.shape[:2], key.shape[2])
    own_tau = query.new_empty(rows if tau is None else (0,), dtype=dtype)
    results = (
        query.new_empty(query.shape),
        query.new_empty(rows, dtype=torch.int32),
        own_tau,
        query.new_empty(rows, dtype=dtype),
        query.new_empty((), dtype=dtype),
    )
    lse = [query.new_empty(query.shape[:3], dtype=dtype) for _ in range(3)]
    lists, selected = (*rows, max_blocks), query.new_empty(query.shape)
    return (*results, *lse, query.new_empty(lists, dtype=torch.int32), query.new_empty(lists, dtype=dtype), selected)  # type: ignore[return-value]


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("tinyonn::dyn_nsa_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    tau: Tensor,
    counts: Tensor,
    lse_compressed: Tensor,
    lse_selected: Tensor,
    lse_window: Tensor,
    indices: Tensor,
    bias: Tensor,
    selected: Tensor,
    grad_out: Tensor,
    grad_soft: Tensor,
    window: int,
    temperature: float,
    block_size: int,
    compress_size: int,
    max_blocks: int,
    detach_scores: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens, key_start, key_end)
    options = Options(window, temperature, block_size, compress_size, max_blocks, detach_scores, scale)
    tensors = (query, key, value, key_compressed, value_compressed, gates, base, slope)
    saved = (lse_compressed, lse_selected, lse_window, indices, counts, bias, selected)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_dyn_nsa

        grads = _triton_dyn_nsa.dyn_nsa_backward(*tensors, tau, *saved, grad_out, grad_soft, options, bounds)
    else:
        grads = dyn_nsa_backward(*tensors, tau, *saved, grad_out, grad_soft, options, bounds)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True))  # type: ignore[return-value]


@_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
    gates: Tensor,
    base: Tensor,
    slope: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, key_compressed, value_compressed, gates, base, slope)
    return tuple(x.new_empty(x.shape) for x in tensors)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, tau, options = inputs[:8], inputs[8], inputs[9:16]
    *bounds, ctx.impl = inputs[16:]
    _, counts, own_tau, _, overflow, *saved = output
    ctx.options = options
    ctx.save_for_backward(*tensors, own_tau if tau is None else tau, counts, *saved, *bounds)
    ctx.mark_non_differentiable(counts, own_tau, overflow, *saved)


def _autograd(ctx: Any, grad_out: Tensor, _: Tensor, __: Tensor, grad_soft: Tensor, *___: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("dyn_nsa", grad_out, grad_soft)
    *saved, cu_seqlens, key_start, key_end = ctx.saved_tensors
    grads = _backward(*saved, grad_out, grad_soft, *ctx.options, cu_seqlens, key_start, key_end, ctx.impl)
    return *grads, *([None] * 12)


_forward.register_autograd(_autograd, setup_context=_setup_context)
