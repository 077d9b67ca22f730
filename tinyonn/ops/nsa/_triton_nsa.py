"""The parts of DynNSA on Triton: allocation and launches of each registered op. The host reads no bound."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_its_device
from ._checks import Bounds, empty_lists
from ._tuples import (
    CompressedOptions,
    CompressedSaved,
    QueryKeyValue,
    SelectInputs,
    SelectOptions,
    SelectSaved,
    SparseInputs,
    SparseOptions,
    WindowOptions,
    WindowSaved,
)  # fmt: skip


def compressed_forward(inputs: QueryKeyValue, options: CompressedOptions, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, entropy."""
    entropy = _statistics(inputs.query)
    return *_interval_forward(inputs, entropy, options, bounds, compressed=True), entropy


def compressed_backward(
    inputs: QueryKeyValue, saved: CompressedSaved, options: CompressedOptions, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_interval_backward`."""
    return _interval_backward(inputs, *saved, options, bounds, compressed=True)


def window_forward(inputs: QueryKeyValue, options: WindowOptions, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """out, lse."""
    return _interval_forward(inputs, None, _as_interval(options, inputs.key.shape[1]), bounds, compressed=False)


def window_backward(
    inputs: QueryKeyValue, saved: WindowSaved, options: WindowOptions, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_interval_backward`."""
    return _interval_backward(inputs, *saved, None, _as_interval(options, inputs.key.shape[1]), bounds, compressed=False)


def _as_interval(options: WindowOptions, num_keys: int) -> CompressedOptions:
    """The window in place of the compress size."""
    return CompressedOptions(min(options.window, num_keys), num_keys, options.scale, options.softcap)


@on_its_device
def _interval_forward(
    inputs: QueryKeyValue, entropy: Tensor | None, options: CompressedOptions, bounds: Bounds, *, compressed: bool
) -> tuple[Tensor, Tensor]:
    """out, lse; writes entropy."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.interval_attention_fwd import interval_attention_fwd

    reach, num_keys, scale, softcap = options
    out = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
    lse = _statistics(inputs.query)
    geometry = geometry_of(inputs.query, num_keys, *bounds)
    interval_attention_fwd(*inputs[:3], out, lse, entropy, geometry, reach, scale, softcap, compressed=compressed)
    return out, lse


@on_its_device
def _interval_backward(
    inputs: QueryKeyValue,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    options: CompressedOptions,
    bounds: Bounds,
    *,
    compressed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; and (B, T, H), the product of out and grad_out."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.interval_attention_dkv import interval_attention_dkv
    from tinyonn_kernels.nsa.interval_attention_dq import interval_attention_dq

    query = inputs.query
    reach, num_keys, scale, softcap = options
    geometry = geometry_of(query, num_keys, *bounds)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    product = _statistics(query)
    given = (*inputs[:3], lse, grad_out, None, None if grad_lse is None else grad_lse.contiguous(), product)
    interval_attention_dq(*given, grad_query, geometry, reach, scale, softcap, compressed=compressed)
    return grad_query, *interval_attention_dkv(*given, geometry, reach, scale, softcap, compressed=compressed), product


@on_its_device
def block_sparse_forward(inputs: SparseInputs, options: SparseOptions, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """out, lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_sparse_fwd import block_sparse_attention_fwd

    out = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
    lse = _statistics(inputs.query)
    geometry = geometry_of(inputs.query, inputs.key.shape[1], *bounds)
    block_sparse_attention_fwd(*_contiguous_lists(inputs)[:6], out, lse, geometry, *options)
    return out, lse


@on_its_device
def block_sparse_backward(
    inputs: SparseInputs, lse: Tensor, shift: Tensor, grad_out: Tensor, options: SparseOptions, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias; `shift` (B, T, H) is the product of out and grad_out, less the gradient of lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_sparse_dkv import block_sparse_attention_dkv
    from tinyonn_kernels.nsa.block_sparse_dq import block_sparse_attention_dq

    query, key, value, _, _, bias = inputs[:6]
    geometry = geometry_of(query, key.shape[1], *bounds)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (key, value))
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    given = (*_contiguous_lists(inputs)[:6], lse, shift.contiguous(), grad_out, None)
    block_sparse_attention_dq(*given, grad_query, grad_bias, geometry, *options)
    block_sparse_attention_dkv(*given, grad_key, grad_value, geometry, *options)
    return grad_query, grad_key, grad_value, grad_bias


def _contiguous_lists(inputs: SparseInputs) -> SparseInputs:
    bias = None if inputs.bias is None else inputs.bias.contiguous()
    return inputs._replace(indices=inputs.indices.contiguous(), counts=inputs.counts.contiguous(), bias=bias)


@on_its_device
def select_forward(inputs: SelectInputs, options: SelectOptions, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts, overflow."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.select_blocks_fwd import select_blocks_fwd

    query, key, lse, threshold = inputs
    temperature, block_size, compress_size, max_blocks, *rule, num_keys, scale, softcap = options
    geometry = geometry_of(query, num_keys, *bounds)
    indices, counts, bias, soft_counts = lists = empty_lists(query, key.shape[2], max_blocks)
    sizes = (num_keys, temperature, block_size, compress_size, *rule, scale, softcap)
    over = select_blocks_fwd(query, key, lse.contiguous(), threshold, *lists, geometry, *sizes)
    return indices, counts, bias, soft_counts, over.sum().float() / (counts > 0).sum().clamp(min=1)


@on_its_device
def select_backward(
    inputs: SelectInputs, saved: SelectSaved, options: SelectOptions, bounds: Bounds, scores_too: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.select_blocks_dk import select_blocks_dk
    from tinyonn_kernels.nsa.select_blocks_dq import select_blocks_dq

    query, key, lse, threshold = inputs
    indices, counts, grad_bias, grad_soft = saved
    temperature, block_size, compress_size, _, *rule, num_keys, scale, softcap = options
    sizes = (geometry_of(query, num_keys, *bounds), num_keys, temperature, block_size, compress_size, *rule, scale, softcap)
    given = (query, key, lse.contiguous(), threshold, indices, counts, grad_bias.float().contiguous(), grad_soft.float().contiguous())
    grad_threshold = torch.empty(threshold.shape, dtype=torch.float32, device=query.device)
    if not scores_too:
        select_blocks_dq(*given, grad_threshold, None, None, *sizes)
        return grad_threshold, None, None, None
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_lse = _statistics(query)
    select_blocks_dq(*given, grad_threshold, grad_query, grad_lse, *sizes)
    return grad_threshold, grad_query, select_blocks_dk(*given, *sizes), grad_lse


def _statistics(query: Tensor) -> Tensor:
    return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
