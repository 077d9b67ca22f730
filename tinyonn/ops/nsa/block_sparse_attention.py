"""`block_sparse_attention`: checks, registration, dispatch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._attention import check_sinks, checked_heads, checked_softcap, scale_of
from .._checks import check_same_device, check_tensor
from .._dispatch import refuse_tangents, statistics_dtype
from . import _torch_block_sparse, _triton_nsa
from ._checks import Bounds, check_bound_values, check_sizes, checked_bounds, lengths_of
from ._register import empty_attended, register_differentiable
from ._sinks import join_sinks, sinks_gradient
from ._tuples import Attended, SparseInputs, SparseOptions, SparseSaved


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of each query to the key blocks of its list.

    Tensors are (B, T, H, D). Differentiable: query, key, value, bias, sinks; out and lse carry gradients. Every run gives key and value
    the same gradients, bit for bit.

    Args:
        query: (B, T, H, D), the last T of Tk positions.
        key, value: (B, Tk, K, D), K dividing H.
        indices: (B, T, K, S) int32, key blocks in ascending order, each at most once, counted from the start of the sequence.
        counts: (B, T, K) int32, number of valid slots; later slots are ignored.
        bias: (B, T, K, S), added to all scores of a block, capped or not: the log of its gate.
        block_size: keys of a block, a power of two.
        scale, softcap, sinks, cu_seqlens, key_start, key_end, impl: as in `compressed_attention`.

    Returns:
        out: (B, T, H, D), 0 where nothing is visible.
        lse: (B, T, H) float32 (float64 for float64), logsumexp of scores and bias, and of the sink if there is one. Where nothing
            is visible, it is -inf, or the sink alone.

    Raises:
        TypeError, ValueError: a dtype, shape, device or size that is not accepted; an index out of range, such as -1 in a valid slot, or
            out of order. On a GPU, where the check would synchronise, lists are checked under `tinyonn.debug()` only; otherwise out, lse
            and the gradient of the query are NaN for a faulty list.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent, as in `compressed_attention`.
    """
    query, key, value = checked_heads(impl, query, key=key, value=value)
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
        check_tensor("bias", bias, query.device, tuple(indices.shape))
    check_sinks(sinks, query)
    options = SparseOptions(block_size, scale_of(query, scale), checked_softcap(softcap))
    if impl == "reference":
        _check_values(indices, counts, key.shape[1], block_size, bounds)
        counts, faulty = _emptied(indices, counts, key.shape[1], block_size, bounds)
        named: dict[str, Any] = {"sinks": sinks, **options._asdict(), **bounds._asdict()}
        out, lse = reference.block_sparse_attention(query, key, value, indices, counts, bias, **named)
        if faulty is not None:
            out, lse = _with_nan(out.clone(), faulty), _with_nan(lse.clone(), faulty)
        return out.to(query.dtype), lse.to(statistics_dtype(query.dtype))
    refuse_tangents("block_sparse_attention", query, key, value, bias, sinks)
    out, lse = _forward_op(query, key, value, indices, counts, bias, sinks, *options, *bounds, impl)
    return out, lse


def _check_values(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> None:
    """Checks the values of bounds and lists: always on a CPU; on a device, where that would synchronise, under `tinyonn.debug()` only."""
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
            f"{int(indices[batch, token, head, slot])} in slot {slot} of {int(counts[batch, token, head])}."
        )
    raise ValueError("indices must ascend within each row.")


def _lists_are_read(indices: Tensor) -> bool:
    return debug_enabled() or indices.device.type == "cpu"


def _outside(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """(B, T, K, S) bool, valid slots whose index is no block of the sequence; and the last block of the sequence."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    last = (-(-lengths_of(indices.shape[1], num_keys, bounds, indices.device) // block_size) - 1)[..., None, None].expand(indices.shape)
    return listed & ((indices < 0) | (indices > last)), last


def _faulty_lists(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> Tensor:
    """(B, T, K) bool, rows whose list is out of range or out of order. Does not synchronise."""
    outside, _ = _outside(indices, counts, num_keys, block_size, bounds)
    slots = torch.arange(indices.shape[-1], device=indices.device)
    unordered = (slots[1:] < counts.unsqueeze(-1)) & (indices[..., 1:] <= indices[..., :-1])
    return outside.any(-1) | unordered.any(-1) | (counts < 0) | (counts > indices.shape[-1])


def _emptied(indices: Tensor, counts: Tensor, num_keys: int, block_size: int, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
    """counts with 0 for faulty lists, so that no kernel follows them; and (B, T, K) bool, faulty lists, None if lists were checked."""
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


def _forward(inputs: SparseInputs, options: SparseOptions, bounds: Bounds, module: ModuleType) -> Attended:
    lists = (inputs.indices, inputs.counts, inputs.key.shape[1], options.block_size, bounds)
    _check_values(*lists)
    counts, faulty = _emptied(*lists)
    out, lse = module.block_sparse_forward(inputs._replace(counts=counts), options, bounds)
    join_sinks(out, lse, inputs.sinks)
    return Attended(_with_nan(out, faulty), _with_nan(lse, faulty))


def _backward(
    inputs: SparseInputs, saved: SparseSaved, options: SparseOptions, bounds: Bounds, _: list[bool], module: ModuleType
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias and sinks."""
    counts, faulty = _emptied(inputs.indices, inputs.counts, inputs.key.shape[1], options.block_size, bounds)
    out, lse, grad_out, grad_lse = saved
    shift = (out.to(lse.dtype) * grad_out).sum(-1) - grad_lse
    grad_query, *others = module.block_sparse_backward(inputs._replace(counts=counts), lse, shift, grad_out, options, bounds)
    grad_sinks = None if inputs.sinks is None else sinks_gradient(inputs.sinks, lse, shift)
    return _with_nan(grad_query, faulty), *others, grad_sinks


_forward_op = register_differentiable(
    "block_sparse_attention", (_torch_block_sparse, _triton_nsa), _forward, empty_attended, _backward,
    tensors=SparseInputs, options=SparseOptions, results=Attended, saved=SparseSaved, constants=("indices", "counts"),
)  # fmt: skip
