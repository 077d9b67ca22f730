"""The whole of DynNSA in plain torch, forward and backward, from its three branches.

    out = gate_c · compressed + gate_s · selected + gate_w · window

Of the branches only the selected one is kept for backward. The other two see all keys of a row at once there, so the product of a
branch with the gradient of out, which is the gradient of its gate, falls out of their backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import statistics_dtype
from ._checks import Bounds
from ._torch_block_sparse import block_sparse_backward, block_sparse_forward
from ._torch_nsa import (
    Span,
    compressed_backward,
    compressed_forward,
    spans_of,
    window_backward,
    window_forward,
)
from ._torch_select import select_backward, select_forward
from ._tuples import Grads, Inputs, Options, Results, Saved


def dyn_nsa_forward(inputs: Inputs, options: Options, bounds: Bounds) -> Results:
    """Forward of the registered op."""
    query, key, value, key_compressed, value_compressed, gates, base, slope, tau = inputs
    window, temperature, block_size, compress_size, max_blocks, _, scale = options
    spans = spans_of(query, key.shape[1], compress_size, *bounds)
    dtype = statistics_dtype(query.dtype)
    compressed, lse_compressed, entropy = compressed_forward(query, key_compressed, value_compressed, spans, compress_size, scale)
    own_tau = attention_tau(entropy, spans, key.shape[2], compress_size) if tau is None else entropy.new_empty(0)
    threshold = base.to(dtype) - slope.to(dtype) * (own_tau if tau is None else tau.to(dtype))
    indices, counts, bias, soft_counts, overflow = select_forward(
        query, key_compressed, lse_compressed, threshold, spans, temperature, block_size, compress_size, max_blocks, scale
    )
    selected, lse_selected = block_sparse_forward(query, key, value, indices, counts, bias, spans, block_size, scale)
    near, lse_window = window_forward(query, key, value, spans, window, scale)
    weights = gates.to(dtype).unsqueeze(-2)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    for branch, part in enumerate((compressed, selected, near)):
        out.addcmul_(part.to(dtype), weights[..., branch])
    return Results(
        out.to(query.dtype), soft_counts, own_tau, overflow, counts, lse_compressed, lse_selected, lse_window, indices, bias, selected
    )


def dyn_nsa_backward(inputs: Inputs, saved: Saved, grads: Grads, options: Options, bounds: Bounds) -> list[Tensor]:
    """Gradients of all inputs but tau, in the dtype of computation."""
    query, key, value, key_compressed, value_compressed, gates, base, slope, tau = inputs
    counts, lse_compressed, lse_selected, lse_window, indices, bias, selected = saved
    grad_out, grad_soft = grads
    assert tau is not None  # forward's own where the caller gave none
    window, temperature, block_size, compress_size, _, detach_scores, scale = options
    spans = spans_of(query, key.shape[1], compress_size, *bounds)
    dtype = lse_compressed.dtype
    weights = gates.to(dtype).unbind(-1)
    grad = grad_out.to(dtype)

    product_selected = (selected.to(dtype) * grad).sum(-1)
    grad_query, grad_key, grad_value, grad_bias = block_sparse_backward(
        query,
        key,
        value,
        indices,
        counts,
        bias,
        lse_selected,
        product_selected * weights[1],
        grad * weights[1].unsqueeze(-1),
        None,
        spans,
        block_size,
        scale,
    )
    part_query, part_key, part_value, product_window = window_backward(
        query, key, value, lse_window, grad, weights[2], spans, window, scale
    )
    grad_query += part_query
    grad_key += part_key
    grad_value += part_value

    uncertainty = tau.to(dtype)
    threshold = base.to(dtype) - slope.to(dtype) * uncertainty
    assert grad_bias is not None
    grad_threshold, score_query, score_key, grad_lse = select_backward(
        query, key_compressed, lse_compressed, threshold, indices, counts, grad_bias, grad_soft, spans, temperature, block_size,
        compress_size, scale, not detach_scores,
    )  # fmt: skip
    compressed_query, grad_key_compressed, grad_value_compressed, product_compressed = compressed_backward(
        query, key_compressed, value_compressed, lse_compressed, grad, weights[0], grad_lse, spans, compress_size, scale
    )
    grad_query += compressed_query
    if score_query is not None and score_key is not None:
        grad_query += score_query
        grad_key_compressed += score_key
    grad_gates = torch.stack([product_compressed, product_selected, product_window], -1)
    grad_base = grad_threshold.sum((0, 1))
    grad_slope = -(grad_threshold * uncertainty).sum((0, 1))
    return [grad_query, grad_key, grad_value, grad_key_compressed, grad_value_compressed, grad_gates, grad_base, grad_slope]


def attention_tau(entropy: Tensor, spans: list[Span], num_kv: int, compress_size: int) -> Tensor:
    """Mean over a group's heads of entropy / log(visible compressed keys), 0 where at most one is visible: (B, T, K)."""
    tau = entropy.new_zeros((*entropy.shape[:2], num_kv))
    for span in spans:
        rows = (span.batch, slice(span.query_begin, span.query_end))
        place = torch.arange(span.first, span.first + span.num_queries, device=entropy.device)
        visible = ((place + 1) // compress_size).to(entropy.dtype).unsqueeze(-1)
        mean = entropy[rows].unflatten(-1, (num_kv, -1)).mean(-1)
        tau[rows] = torch.where(visible > 1, mean / visible.clamp(min=2).log(), 0)
    return tau
