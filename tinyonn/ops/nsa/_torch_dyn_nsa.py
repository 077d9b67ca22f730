"""The whole of DynNSA in plain torch, forward and backward, from its three branches.

    out = gate_c · compressed + gate_s · selected + gate_w · window

Backward keeps the output of the selected branch only. The gradient of a gate is the product of its branch and the gradient of out; the
backward of the other two branches computes this product without their outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import statistics_dtype
from ._checks import Bounds
from ._sinks import join_sinks, sinks_gradient
from ._torch_block_sparse import block_sparse_backward, block_sparse_forward
from ._torch_nsa import compressed_backward, compressed_forward, spans_of, window_backward, window_forward
from ._torch_select import select_backward, select_forward
from ._tuples import (
    CompressedOptions,
    CompressedSaved,
    DynNSAInputs,
    DynNSANumbers,
    DynNSAResults,
    DynNSASaved,
    QueryKeyValue,
    SelectInputs,
    SelectOptions,
    SelectSaved,
    SparseInputs,
    SparseOptions,
    WindowOptions,
    WindowSaved,
)  # fmt: skip


def dyn_nsa_forward(inputs: DynNSAInputs, options: DynNSANumbers, bounds: Bounds) -> DynNSAResults:
    """Forward of the registered op."""
    query, key, value, key_compressed, value_compressed, gates, base, slope, tau, query_compressed, sinks = inputs
    scoring = query if query_compressed is None else query_compressed
    dtype, num_kv = statistics_dtype(query.dtype), key.shape[2]
    of = _parts(options, key.shape[1])
    compressed, lse_compressed, entropy = compressed_forward(
        QueryKeyValue(scoring, key_compressed, value_compressed), of.compressed, bounds
    )
    join_sinks(compressed, lse_compressed, sinks)
    own_tau = attention_tau(entropy, query, of.compressed, num_kv, bounds) if tau is None else entropy.new_empty(0)
    threshold = base.to(dtype) - slope.to(dtype) * (own_tau if tau is None else tau.to(dtype))
    lists = select_forward(SelectInputs(scoring, key_compressed, lse_compressed, threshold), of.select, bounds)
    indices, counts, bias, soft_counts, overflow = lists
    selected, lse_selected = block_sparse_forward(SparseInputs(query, key, value, indices, counts, bias), of.sparse, bounds)
    join_sinks(selected, lse_selected, sinks)
    near, lse_window = window_forward(QueryKeyValue(query, key, value), of.window, bounds)
    join_sinks(near, lse_window, sinks)
    weights = gates.to(dtype).unsqueeze(-2)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    for branch, part in enumerate((compressed, selected, near)):
        out.addcmul_(part.to(dtype), weights[..., branch])
    return DynNSAResults(
        out.to(query.dtype), soft_counts, own_tau, overflow, counts, lse_compressed, lse_selected, lse_window, indices, bias, selected
    )


def dyn_nsa_backward(inputs: DynNSAInputs, saved: DynNSASaved, options: DynNSANumbers, bounds: Bounds) -> list[Tensor | None]:
    """Gradients of all inputs except tau, in the dtype of computation."""
    query, key, value, key_compressed, value_compressed, gates, base, slope, tau, query_compressed, sinks = inputs
    scoring = query if query_compressed is None else query_compressed
    _, counts, lse_compressed, lse_selected, lse_window, indices, bias, selected, grad_out, grad_soft = saved
    assert tau is not None  # that of forward if the caller gave none
    of = _parts(options, key.shape[1])
    dtype = lse_compressed.dtype
    weights = gates.to(dtype).unbind(-1)
    grad = grad_out.to(dtype)

    product_selected = (selected.to(dtype) * grad).sum(-1)
    sparse, shift = SparseInputs(query, key, value, indices, counts, bias), product_selected * weights[1]
    grad_query, grad_key, grad_value, grad_bias = block_sparse_backward(
        sparse, lse_selected, shift, grad * weights[1].unsqueeze(-1), of.sparse, bounds
    )
    part_query, part_key, part_value, product_window = window_backward(
        QueryKeyValue(query, key, value), WindowSaved(lse_window, grad), of.window, bounds, weights[2]
    )
    grad_query += part_query
    grad_key += part_key
    grad_value += part_value

    uncertainty = tau.to(dtype)
    threshold = base.to(dtype) - slope.to(dtype) * uncertainty
    assert grad_bias is not None
    scores, lists = SelectInputs(scoring, key_compressed, lse_compressed, threshold), SelectSaved(indices, counts, grad_bias, grad_soft)
    grad_threshold, score_query, score_key, grad_lse = select_backward(scores, lists, of.select, bounds, not options.detach_scores)
    compressed, given = QueryKeyValue(scoring, key_compressed, value_compressed), CompressedSaved(lse_compressed, grad, grad_lse)
    part_scoring, grad_key_compressed, grad_value_compressed, product_compressed = compressed_backward(
        compressed, given, of.compressed, bounds, weights[0]
    )
    grad_scoring = grad_query.add_(part_scoring) if query_compressed is None else part_scoring
    if score_query is not None and score_key is not None:
        grad_scoring += score_query
        grad_key_compressed += score_key
    grad_gates = torch.stack([product_compressed, product_selected, product_window], -1)
    grad_base = grad_threshold.sum((0, 1))
    grad_slope = -(grad_threshold * uncertainty).sum((0, 1))
    of_scoring = None if query_compressed is None else grad_scoring
    grad_sinks = None
    if sinks is not None:
        shift_compressed = product_compressed * weights[0]
        if grad_lse is not None:
            shift_compressed -= grad_lse
        branches = ((lse_compressed, shift_compressed), (lse_selected, shift), (lse_window, product_window * weights[2]))
        grad_sinks = torch.stack([sinks_gradient(sinks, *branch) for branch in branches]).sum(0)
    grad_inputs = [grad_query, grad_key, grad_value, grad_key_compressed, grad_value_compressed]
    return [*grad_inputs, grad_gates, grad_base, grad_slope, of_scoring, grad_sinks]


class _Parts(NamedTuple):
    compressed: CompressedOptions
    select: SelectOptions
    sparse: SparseOptions
    window: WindowOptions


def _parts(options: DynNSANumbers, num_keys: int) -> _Parts:
    window, temperature, block_size, compress_size, max_blocks, importance, first, local, _, scale, softcap = options
    return _Parts(
        CompressedOptions(compress_size, num_keys, scale, softcap),
        SelectOptions(temperature, block_size, compress_size, max_blocks, importance, first, local, num_keys, scale, softcap),
        SparseOptions(block_size, scale, softcap),
        WindowOptions(window, scale, softcap),
    )


def attention_tau(entropy: Tensor, query: Tensor, options: CompressedOptions, num_kv: int, bounds: Bounds) -> Tensor:
    """Mean over a group's heads of entropy / log(visible compressed keys), 0 where at most one is visible: (B, T, K)."""
    tau = entropy.new_zeros((*entropy.shape[:2], num_kv))
    for span in spans_of(query, options.num_keys, options.compress_size, bounds):
        rows = (span.batch, slice(span.query_begin, span.query_end))
        place = torch.arange(span.first, span.first + span.num_queries, device=entropy.device)
        visible = ((place + 1) // options.compress_size).to(entropy.dtype).unsqueeze(-1)
        mean = entropy[rows].unflatten(-1, (num_kv, -1)).mean(-1)
        tau[rows] = torch.where(visible > 1, mean / visible.clamp(min=2).log(), 0)
    return tau
