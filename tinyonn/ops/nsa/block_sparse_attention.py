"""`block_sparse_attention`: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._dispatch import check_impl, check_same_device, parts_of, register, schema_of, statistics_dtype
from ._checks import (
    Bounds,
    check_bound_values,
    check_keys,
    check_query,
    check_shape,
    check_sizes,
    checked_bounds,
    choose_nsa_impl,
    in_dtypes_of,
    in_one_dtype,
    lengths_of,
    like_inputs,
    refuse_tangents,
    scale_of,
)
from ._torch_block_sparse import block_sparse_backward, block_sparse_forward
from ._torch_nsa import spans_of


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to the key blocks of its list.

    Tensors are (B, T, H, D). Differentiable: query, key, value, bias; out and lse carry gradients. dk and dv are the same bits on every
    run.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        indices: (B, T, K, S) int32, key blocks in ascending order, each at most once, counted from the start of the sequence.
        counts: (B, T, K) int32, how many of them count; the slots behind may hold anything.
        bias: (B, T, K, S), added to all scores of a block: the log of its gate.
        block_size: keys of a block, a power of two.
        scale, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        out: (B, T, H, D), 0 where nothing is visible.
        lse: (B, T, H) float32 (float64 for float64), logsumexp of scores and bias, -inf there.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted; a list out of range, such as -1 in a slot that counts,
            or out of order. On a GPU, where reading them would wait for it, lists are checked under `tinyonn.debug()` only; otherwise
            out, lse and the query's gradient are NaN where the list is faulty.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    check_impl(impl)
    query, key, value = in_one_dtype(query, key, value)
    check_query(query)
    check_keys(query, "key", key, "value", value)
    check_sizes(block_size, 16)
    bounds = checked_bounds(query, key, key.shape[1], cu_seqlens, key_start, key_end)
    rows = (*query.shape[:2], key.shape[2])
    for name, tensor, dims in (("indices", indices, 4), ("counts", counts, 3)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}.")
        check_same_device(name, tensor, query.device)
        if tensor.dim() != dims or tuple(tensor.shape[:3]) != rows:
            raise ValueError(f"{name} must have shape {rows if dims == 3 else (*rows, 'S')}, got {tuple(tensor.shape)}.")
    if bias is not None:
        check_shape("bias", bias, tuple(indices.shape), query)
    scale = scale_of(query, scale)
    if impl == "reference":
        _check_values(indices, counts, key.shape[1], block_size, bounds)
        counts, faulty = _emptied(indices, counts, key.shape[1], block_size, bounds)
        out, lse = reference.block_sparse_attention(
            query, key, value, indices, counts, bias, block_size=block_size, scale=scale, **bounds._asdict()
        )
        if faulty is not None:
            out, lse = _with_nan(out.clone(), faulty), _with_nan(lse.clone(), faulty)
        return out.to(query.dtype), lse.to(statistics_dtype(query.dtype))
    refuse_tangents("block_sparse_attention", query, key, value, bias)
    out, lse = _forward_op(query, key, value, indices, counts, bias, block_size, scale, *bounds, impl)
    return out, lse


def _check_values(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> None:
    """Reads bounds and lists: on a CPU always, on a device, where that would wait for it, under `tinyonn.debug()`."""
    check_bound_values(num_keys, bounds)
    if not (_lists_are_read(indices) and bool(_faulty_lists(indices, counts, num_keys, block_size, bounds).any())):
        return
    slots = indices.shape[-1]
    if bool(((counts < 0) | (counts > slots)).any()):
        raise ValueError(f"counts must be 0 … {slots}, got {int(counts.min())} … {int(counts.max())}.")
    outside, last = _outside(indices, counts, num_keys, block_size, bounds)
    if bool(outside.any()):
        batch, token, head, slot = outside.nonzero()[0].tolist()
        raise ValueError(
            f"indices must be 0 … {int(last[batch, token, head, slot])} in the sequence of token {token}, got "
            f"{int(indices[batch, token, head, slot])} in slot {slot} of {int(counts[batch, token, head])} that count."
        )
    raise ValueError("indices must ascend within each row, got some that do not.")


def _lists_are_read(indices: Tensor) -> bool:
    return debug_enabled() or indices.device.type == "cpu"


def _outside(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """(B, T, K, S) bool, slots that count and name no block of their sequence; and its last block."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    last = (-(-lengths_of(indices.shape[1], num_keys, bounds, indices.device) // block_size) - 1)[..., None, None].expand(indices.shape)
    return listed & ((indices < 0) | (indices > last)), last


def _faulty_lists(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> Tensor:
    """(B, T, K) bool, rows whose list is not as the op takes it. Nothing waits for a device."""
    outside, _ = _outside(indices, counts, num_keys, block_size, bounds)
    slots = torch.arange(indices.shape[-1], device=indices.device)
    unordered = (slots[1:] < counts.unsqueeze(-1)) & (indices[..., 1:] <= indices[..., :-1])
    return outside.any(-1) | unordered.any(-1) | (counts < 0) | (counts > indices.shape[-1])


def _emptied(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
    """counts, 0 for faulty lists, which no kernel then follows, and where those are, (B, T, K); None where lists were checked."""
    if _lists_are_read(indices):
        return counts, None
    faulty = _faulty_lists(indices, counts, num_keys, block_size, bounds)
    return counts.masked_fill(faulty, 0), faulty


def _with_nan(x: Tensor, faulty: Tensor | None) -> Tensor:
    """(B, T, H, ·) with NaN for the queries of faulty lists."""
    if faulty is None:
        return x
    rows = faulty.repeat_interleave(x.shape[2] // faulty.shape[2], 2)
    return x.masked_fill_(rows.view(*rows.shape, *[1] * (x.dim() - 3)), torch.nan)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor
    bias: Tensor | None


class Options(NamedTuple):
    block_size: int
    scale: float


class Statistics(NamedTuple):
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, bounds, impl = parts_of(arguments, Inputs, Options, Bounds)
    lists = (inputs.indices, inputs.counts, inputs.key.shape[1], options.block_size, bounds)
    _check_values(*lists)
    counts, faulty = _emptied(*lists)
    inputs = inputs._replace(counts=counts)
    if choose_nsa_impl(impl, inputs.query) == "triton":
        from . import _triton_nsa

        out, lse = _triton_nsa.block_sparse_forward(*inputs, *options, bounds)
    else:
        out, lse = block_sparse_forward(*inputs, spans_of(inputs.query, inputs.key.shape[1], options.block_size, *bounds), *options)
    return _with_nan(out, faulty), _with_nan(lse, faulty)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and bias; empty without a bias."""
    inputs, given, options, bounds, impl = parts_of(arguments, Inputs, Statistics, Options, Bounds)
    query, key, value, indices, counts, bias = inputs
    counts, faulty = _emptied(indices, counts, key.shape[1], options.block_size, bounds)
    inputs = inputs._replace(counts=counts)
    if choose_nsa_impl(impl, query) == "triton":
        from . import _triton_nsa

        grads = _triton_nsa.block_sparse_backward(*inputs, *given, *options, bounds)
    else:
        out, lse, grad_out, grad_lse = given
        spans = spans_of(query, key.shape[1], options.block_size, *bounds)
        product = (out.to(lse.dtype) * grad_out).sum(-1)
        grads = block_sparse_backward(*inputs, lse, product, grad_out, grad_lse, spans, *options)
    grad_query, grad_key, grad_value = in_dtypes_of((query, key, value), grads[:3])
    grad_bias = query.new_empty(0) if bias is None or grads[3] is None else grads[3].to(bias.dtype)
    return _with_nan(grad_query, faulty), grad_key, grad_value, grad_bias


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments[: len(Inputs._fields)])
    grad_bias = inputs.query.new_empty(0) if inputs.bias is None else inputs.bias.new_empty(inputs.bias.shape)
    return *like_inputs(*inputs), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, bounds, ctx.impl = parts_of(inputs, Inputs, Options, Bounds)
    ctx.save_for_backward(*tensors, *output, *bounds)
    ctx.has_bias = tensors.bias is not None


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("block_sparse_attention", grad_out, grad_lse)
    tensors, out, lse, *bounds = parts_of(ctx.saved_tensors, Inputs)
    *grads, grad_bias = _backward_op(*tensors, out, lse, grad_out, grad_lse, *ctx.options, *bounds, ctx.impl)
    return *grads, None, None, grad_bias if ctx.has_bias else None, *([None] * 6)


_forward_op = register("block_sparse_attention", _forward, _fake, schema_of(Inputs, Options, Bounds, returns=2))
_backward_op = register(
    "block_sparse_attention_backward", _backward, _fake_backward, schema_of(Inputs, Statistics, Options, Bounds, returns=4)
)
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
