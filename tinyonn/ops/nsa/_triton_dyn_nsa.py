"""The whole of DynNSA on Triton, forward and backward, from its three branches.

    out = gate_c · compressed + gate_s · selected + gate_w · window

Of the branches only the selected one is kept for backward; the product of the others with the gradient of out, which is the gradient
of their gate, falls out of their backward. What is query-outer runs in chunks of tokens, over one float32 sum a chunk: sums of four
parts in half precision would lose digits, and one for all tokens would be the largest tensor there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_its_device
from ._checks import Bounds, empty_lists
from ._sinks import sinks_gradient
from ._tuples import DynNSAInputs, DynNSANumbers, DynNSAResults, DynNSASaved

CHUNK_ELEMENTS = 1 << 25  # of the float32 sum, 128 MiB


def chunks_of(query: Tensor) -> list[slice]:
    """Chunks of tokens of at most CHUNK_ELEMENTS values. The last chunk comes first: it reads the most keys, so it tunes the tile sizes."""
    batch, tokens, heads, dim = query.shape
    size = max(1, CHUNK_ELEMENTS // max(1, batch * heads * dim))
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)][::-1]


def float32_sum(target: Tensor, chunks: list[slice]) -> Tensor | None:
    """Buffer for the sum of a chunk; None if the sum is computed in the target."""
    if target.dtype == torch.float32 or not chunks:
        return None
    longest = chunks[-1].stop  # the first tokens' chunk is whole
    return torch.empty((target.shape[0], longest, *target.shape[2:]), dtype=torch.float32, device=target.device)


def largest_entropy(start: Tensor, before: int, compress_size: int) -> Tensor:
    """(B, T, 1) log of the number of compressed keys that a query sees; infinite where it sees fewer than two.

    Args:
        start: (B, Tk), first key of the sequence at each key; the queries are those after the first `before` keys.
    """
    place = torch.arange(before, start.shape[1], dtype=torch.int32, device=start.device)
    visible = (place - start[:, before:] + 1) // compress_size
    return torch.where(visible > 1, visible.float().log(), torch.inf).unsqueeze(-1)


@on_its_device
def dyn_nsa_forward(inputs: DynNSAInputs, options: DynNSANumbers, bounds: Bounds) -> DynNSAResults:
    """Forward of the registered op."""
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_sparse_fwd import block_sparse_attention_fwd
    from tinyonn_kernels.nsa.interval_attention_fwd import interval_attention_fwd
    from tinyonn_kernels.nsa.select_blocks_fwd import select_blocks_fwd

    query, key, value, key_compressed, value_compressed, gates, base, slope, tau, query_compressed, sinks = inputs
    scoring = query if query_compressed is None else query_compressed
    window, temperature, block_size, compress_size, max_blocks, *rule, _, scale, softcap = options
    num_keys, num_kv = key.shape[1:3]
    window = min(window, num_keys)
    whole = geometry_of(query, num_keys, *bounds)
    out, selected = (torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(2))
    lse_compressed, lse_selected, lse_window, entropy = (
        torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(4)
    )
    indices, counts, bias, soft_counts = empty_lists(query, num_kv, max_blocks)
    own_tau = torch.empty_like(soft_counts) if tau is None else entropy.new_empty(0)
    per_entropy = largest_entropy(whole.start, whole.before, compress_size).reciprocal() if tau is None else None
    overflowing = torch.zeros((), dtype=torch.int64, device=query.device)
    chunks = chunks_of(query)
    scratch = float32_sum(out, chunks)
    for chunk in chunks:
        rows = (slice(None), chunk)
        geometry = whole.of_chunk(chunk.start)
        q, scoring_q, weights = query[rows], scoring[rows], gates[rows].unbind(-1)
        mixed = out[rows] if scratch is None else scratch[:, : q.shape[1]]
        interval_attention_fwd(
            scoring_q, key_compressed, value_compressed, mixed, lse_compressed[rows], entropy[rows], geometry, compress_size, scale,
            softcap, compressed=True, weight=weights[0], sinks=sinks,
        )  # fmt: skip
        interval_attention_fwd(
            q, key, value, mixed, lse_window[rows], None, geometry, window, scale, softcap, compressed=False, weight=weights[2],
            sinks=sinks, accumulate=True,
        )  # fmt: skip
        if per_entropy is not None:
            own_tau[rows] = entropy[rows].unflatten(-1, (num_kv, -1)).mean(-1) * per_entropy[rows]
        threshold = base.float() - slope.float() * (own_tau if tau is None else tau)[rows].float()
        lists = (indices[rows], counts[rows], bias[rows])
        over = select_blocks_fwd(
            scoring_q, key_compressed, lse_compressed[rows], threshold, *lists, soft_counts[rows], geometry, num_keys, temperature,
            block_size, compress_size, *rule, scale, softcap,
        )  # fmt: skip
        overflowing += over.sum()
        block_sparse_attention_fwd(
            q, key, value, *lists, selected[rows], lse_selected[rows], geometry, block_size, scale, softcap, sinks=sinks,
            weight=weights[1], added=mixed, total=out[rows],
        )  # fmt: skip
    overflow = overflowing.float() / (counts > 0).sum().clamp(min=1)
    return DynNSAResults(out, soft_counts, own_tau, overflow, counts, lse_compressed, lse_selected, lse_window, indices, bias, selected)


@on_its_device
def dyn_nsa_backward(inputs: DynNSAInputs, saved: DynNSASaved, options: DynNSANumbers, bounds: Bounds) -> list[Tensor | None]:
    """Gradients of both queries (in their dtype) and of the other inputs except tau (float32)."""
    from tinyonn_kernels.nsa._common import geometry_of, unit_stride
    from tinyonn_kernels.nsa.block_sparse_dkv import block_sparse_attention_dkv
    from tinyonn_kernels.nsa.block_sparse_dq import block_sparse_attention_dq
    from tinyonn_kernels.nsa.interval_attention_dkv import interval_attention_dkv
    from tinyonn_kernels.nsa.interval_attention_dq import interval_attention_dq
    from tinyonn_kernels.nsa.select_blocks_dk import select_blocks_dk
    from tinyonn_kernels.nsa.select_blocks_dq import select_blocks_dq

    query, key, value, key_compressed, value_compressed, gates, base, slope, tau, query_compressed, sinks = inputs
    scoring = query if query_compressed is None else query_compressed
    _, counts, lse_compressed, lse_selected, lse_window, indices, bias, selected, grad_out, grad_soft = saved
    assert tau is not None  # that of forward if the caller gave none
    window, temperature, block_size, compress_size, _, *rule, detach_scores, scale, softcap = options
    num_keys = key.shape[1]
    window = min(window, num_keys)
    whole = geometry_of(query, num_keys, *bounds)
    sizes = (num_keys, temperature, block_size, compress_size, *rule, scale, softcap)
    grad_out, grad_soft = unit_stride(grad_out), grad_soft.contiguous()
    threshold = base.float() - slope.float() * tau.float()
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_scoring = None if query_compressed is None else torch.empty_like(grad_query)
    products = [torch.empty_like(lse_compressed) for _ in range(3)]
    shifts = torch.empty_like(lse_compressed)
    grad_threshold = torch.empty_like(threshold)
    grad_bias = torch.zeros_like(bias)
    grad_lse = None if detach_scores else torch.empty_like(lse_compressed)
    chunks = chunks_of(query)
    scratch = float32_sum(grad_query, chunks)
    for chunk in chunks:
        rows = (slice(None), chunk)
        geometry = whole.of_chunk(chunk.start)
        q, scoring_q, grad, weights = query[rows], scoring[rows], grad_out[rows], gates[rows].unbind(-1)
        of_compressed, of_selected, of_window = (product[rows] for product in products)
        lists = (indices[rows], counts[rows])
        # Sums of the chunk; that of `query_compressed`, if it differs, begins after that of `query`.
        grad_q = grad_query[rows] if scratch is None else scratch[:, : q.shape[1]]
        grad_s = grad_q if grad_scoring is None or scratch is not None else grad_scoring[rows]
        block_sparse_attention_dq(
            q, key, value, *lists, bias[rows], lse_selected[rows], shifts[rows], grad, weights[1], grad_q, grad_bias[rows], geometry,
            block_size, scale, softcap, out=selected[rows], product=of_selected,
        )  # fmt: skip
        interval_attention_dq(
            q, key, value, lse_window[rows], grad, weights[2], None, of_window, grad_q if grad_scoring is None else grad_query[rows],
            geometry, window, scale, softcap, compressed=False, added=grad_q,
        )  # fmt: skip
        chunk_lse = None if grad_lse is None else grad_lse[rows]
        select_blocks_dq(
            scoring_q, key_compressed, lse_compressed[rows], threshold[rows], *lists, grad_bias[rows], grad_soft[rows],
            grad_threshold[rows], None if detach_scores else grad_s, chunk_lse, geometry, *sizes, accumulate=grad_scoring is None,
        )  # fmt: skip
        interval_attention_dq(
            scoring_q, key_compressed, value_compressed, lse_compressed[rows], grad, weights[0], chunk_lse, of_compressed,
            (grad_query if grad_scoring is None else grad_scoring)[rows], geometry, compress_size, scale, softcap, compressed=True,
            added=None if detach_scores and grad_scoring is not None else grad_s,
        )  # fmt: skip
    del scratch

    weights = gates.unbind(-1)
    grad_key, grad_value = interval_attention_dkv(
        query, key, value, lse_window, grad_out, weights[2], None, products[2], whole, window, scale, softcap, compressed=False
    )
    block_sparse_attention_dkv(
        query, key, value, indices, counts, bias, lse_selected, shifts, grad_out, weights[1], grad_key, grad_value, whole, block_size,
        scale, softcap,
    )  # fmt: skip
    grad_key_compressed, grad_value_compressed = interval_attention_dkv(
        scoring, key_compressed, value_compressed, lse_compressed, grad_out, weights[0], grad_lse, products[0], whole, compress_size, scale,
        softcap, compressed=True,
    )  # fmt: skip
    if not detach_scores:
        grad_key_compressed += select_blocks_dk(
            scoring, key_compressed, lse_compressed, threshold, indices, counts, grad_bias, grad_soft, whole, *sizes
        )
    grad_base = grad_threshold.sum((0, 1))
    grad_slope = -(grad_threshold * tau.float()).sum((0, 1))
    grad_gates = torch.stack(products, -1)
    grad_sinks = None
    if sinks is not None:
        shift_compressed = products[0] * weights[0].float()
        if grad_lse is not None:
            shift_compressed -= grad_lse
        branches = ((lse_compressed, shift_compressed), (lse_selected, shifts), (lse_window, products[2] * weights[2].float()))
        grad_sinks = torch.stack([sinks_gradient(sinks, *branch) for branch in branches]).sum(0)
    grad_inputs = [grad_query, grad_key, grad_value, grad_key_compressed, grad_value_compressed]
    return [*grad_inputs, grad_gates, grad_base, grad_slope, grad_scoring, grad_sinks]
