"""The parts of DynNSA on Triton: what each registered op allocates and launches. No bound is read by the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_its_device
from ._checks import Bounds


@on_its_device
def compressed_forward(
    query: Tensor, key: Tensor, value: Tensor, compress_size: int, num_keys: int, scale: float, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, entropy."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.interval_attention_fwd import interval_attention_fwd

    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse, entropy = _statistics(query), _statistics(query)
    geometry = geometry_of(query, num_keys, *bounds)
    interval_attention_fwd(query, key, value, out, lse, entropy, geometry, compress_size, scale, compressed=True)
    return out, lse, entropy


@on_its_device
def compressed_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    compress_size: int,
    num_keys: int,
    scale: float,
    bounds: Bounds,
) -> tuple[Tensor, Tensor, Tensor]:
    from tinyonn_kernels.nsa._common import geometry_of

    geometry = geometry_of(query, num_keys, *bounds)
    return _interval_backward(query, key, value, lse, grad_out, grad_lse.contiguous(), geometry, compress_size, scale, compressed=True)


@on_its_device
def window_forward(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """out, lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.interval_attention_fwd import interval_attention_fwd

    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = _statistics(query)
    geometry = geometry_of(query, key.shape[1], *bounds)
    interval_attention_fwd(query, key, value, out, lse, None, geometry, min(window, key.shape[1]), scale, compressed=False)
    return out, lse


@on_its_device
def window_backward(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, grad_out: Tensor, window: int, scale: float, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    from tinyonn_kernels.nsa._common import geometry_of

    geometry = geometry_of(query, key.shape[1], *bounds)
    return _interval_backward(query, key, value, lse, grad_out, None, geometry, min(window, key.shape[1]), scale, compressed=False)


@on_its_device
def block_sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    block_size: int,
    scale: float,
    bounds: Bounds,
) -> tuple[Tensor, Tensor]:
    """out, lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_sparse_fwd import block_sparse_attention_fwd

    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = _statistics(query)
    geometry = geometry_of(query, key.shape[1], *bounds)
    indices, counts, bias = indices.contiguous(), counts.contiguous(), None if bias is None else bias.contiguous()
    block_sparse_attention_fwd(query, key, value, indices, counts, bias, out, lse, geometry, block_size, scale)
    return out, lse


@on_its_device
def block_sparse_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    block_size: int,
    scale: float,
    bounds: Bounds,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_sparse_dkv import block_sparse_attention_dkv
    from tinyonn_kernels.nsa.block_sparse_dq import block_sparse_attention_dq

    geometry = geometry_of(query, key.shape[1], *bounds)
    indices, counts, bias = indices.contiguous(), counts.contiguous(), None if bias is None else bias.contiguous()
    shift = ((out.float() * grad_out).sum(-1) - grad_lse).contiguous()
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (key, value))
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    inputs = (query, key, value, indices, counts, bias, lse, shift, grad_out, None)
    block_sparse_attention_dq(*inputs, grad_query, grad_bias, geometry, block_size, scale)
    block_sparse_attention_dkv(*inputs, grad_key, grad_value, geometry, block_size, scale)
    return grad_query, grad_key, grad_value, grad_bias


@on_its_device
def select_forward(
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
    bounds: Bounds,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts, overflow."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.select_blocks_fwd import select_blocks_fwd

    geometry = geometry_of(query, num_keys, *bounds)
    indices, counts, bias, soft_counts = empty_lists(query, key.shape[2], max_blocks)
    lists = (indices, counts, bias, soft_counts)
    sizes = (num_keys, temperature, block_size, compress_size, scale)
    over = select_blocks_fwd(query, key, lse.contiguous(), threshold, *lists, geometry, *sizes)
    return *lists, over.sum().float() / (counts > 0).sum().clamp(min=1)


@on_its_device
def select_backward(
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
    bounds: Bounds,
    scores_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of threshold and, with `scores_too`, of query, key and lse."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.select_blocks_dk import select_blocks_dk
    from tinyonn_kernels.nsa.select_blocks_dq import select_blocks_dq

    geometry = geometry_of(query, num_keys, *bounds)
    sizes = (geometry, num_keys, temperature, block_size, compress_size, scale)
    inputs = (query, key, lse.contiguous(), threshold, indices, counts, grad_bias.float().contiguous(), grad_soft.float().contiguous())
    grad_threshold = torch.empty(threshold.shape, dtype=torch.float32, device=query.device)
    if not scores_too:
        select_blocks_dq(*inputs, grad_threshold, None, None, *sizes)
        return grad_threshold, None, None, None
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_lse = _statistics(query)
    select_blocks_dq(*inputs, grad_threshold, grad_query, grad_lse, *sizes)
    return grad_threshold, grad_query, select_blocks_dk(*inputs, *sizes), grad_lse


def empty_lists(query: Tensor, num_kv: int, max_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices, counts, bias, soft_counts as they are where nothing is selected."""
    rows, device = (*query.shape[:2], num_kv), query.device
    return (
        torch.full((*rows, max_blocks), -1, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros((*rows, max_blocks), dtype=torch.float32, device=device),
        torch.zeros(rows, dtype=torch.float32, device=device),
    )


def _interval_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    geometry: object,
    reach: int,
    scale: float,
    *,
    compressed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from tinyonn_kernels.nsa._common import Geometry
    from tinyonn_kernels.nsa.interval_attention_dkv import interval_attention_dkv
    from tinyonn_kernels.nsa.interval_attention_dq import interval_attention_dq

    assert isinstance(geometry, Geometry)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    product = _statistics(query)
    inputs = (query, key, value, lse, grad_out, None, grad_lse, product)
    interval_attention_dq(*inputs, grad_query, geometry, reach, scale, compressed=compressed)
    return grad_query, *interval_attention_dkv(*inputs, geometry, reach, scale, compressed=compressed)


def _statistics(query: Tensor) -> Tensor:
    return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
