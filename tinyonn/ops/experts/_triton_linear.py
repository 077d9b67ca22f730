"""One projection per (token, expert) pair on Triton: allocation and launches. The host reads no number of pairs.

N tokens, F features, E experts, O outputs, K slots of a token. Memory besides the result: with weights, a row of O per slot; backward needs
a row of F per slot, and a sorted copy of the rows that the gradient of the weight multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import on_its_device, statistics_dtype, without_autocast
from . import _torch_linear
from ._linear_tuples import LinearGradients, LinearInputs, LinearOrder, LinearSaved, LinearWanted


@on_its_device
def _sorted(index: Tensor, num_experts: int, dtype: torch.dtype, order: LinearOrder) -> Any:
    """`SortedPairs`, of the order if there is one."""
    from tinyonn_kernels.experts.expert_activation import rows_of
    from tinyonn_kernels.experts.expert_sort import SortedPairs, sort_pairs

    rows = rows_of(index.numel(), num_experts, dtype)
    if order.slots is None or order.tile_expert is None:
        return sort_pairs(index, num_experts, rows)
    tiles = index.numel() // rows + min(num_experts, index.numel())
    if order.tile_expert.numel() != tiles:
        raise ValueError(
            f"order must be sort_slots with dtype={dtype} and the impl of this call, got one of {order.tile_expert.numel()} tiles."
        )
    return SortedPairs(order.slots.int(), *order[1:], rows)


@on_its_device
@without_autocast
def linear_forward(inputs: LinearInputs, order: LinearOrder) -> Tensor:
    from tinyonn_kernels.experts.expert_rows import combine_slots, products_into

    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    (tokens, slots), (experts, outputs, features) = top_k_index.shape, weight.shape
    if not (top_k_index.numel() and weight.numel()):
        return _torch_linear.linear_forward(inputs, LinearOrder())
    rows = hidden_states.new_zeros(tokens * slots, outputs)
    index = top_k_index.contiguous()
    pairs = _sorted(index, experts, hidden_states.dtype, order)
    weights = None if top_k_weights is None else top_k_weights.float().contiguous()
    source = hidden_states.reshape(-1, features).contiguous()
    products_into(rows, source, "token" if hidden_states.dim() == 2 else "slot", weight.mT, bias, weights, slots, pairs)
    return combine_slots(rows, index, experts) if weights is not None else rows.view(tokens, slots, outputs)


@on_its_device
@without_autocast
def linear_backward(inputs: LinearInputs, order: LinearOrder, saved: LinearSaved, wanted: LinearWanted) -> LinearGradients:
    from tinyonn_kernels.experts.expert_outer import expert_outer
    from tinyonn_kernels.experts.expert_rows import combine_slots, products_into

    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    (tokens, slots), (experts, outputs, features) = top_k_index.shape, weight.shape
    if not (top_k_index.numel() and weight.numel()):
        return _torch_linear.linear_backward(inputs, LinearOrder(), saved, wanted)
    wide = statistics_dtype(hidden_states.dtype)
    grad_out = saved.grad_out.to(hidden_states.dtype)
    index = top_k_index.contiguous()
    pairs = _sorted(index, experts, hidden_states.dtype, order)
    weights = None if top_k_weights is None else top_k_weights.float().contiguous()
    grads, rows = grad_out.reshape(-1, outputs).contiguous(), hidden_states.reshape(-1, features).contiguous()
    whole = hidden_states.dim() == 2  # one row for all slots of a token
    used = (index >= 0) & (index < experts)

    grad_hidden = grad_weights = grad_weight = grad_bias = None
    if wanted.grad_hidden or wanted.grad_weights:
        found = hidden_states.new_zeros(tokens * slots, features)
        products_into(found, grads, "slot" if weights is None else "token", weight, None, None, slots, pairs)
        if weights is not None and wanted.grad_weights:
            own = found.view(tokens, slots, features).to(wide) * rows.view(tokens, -1, features)
            grad_weights = own.masked_fill(~used.unsqueeze(-1), 0).sum(-1)
            if bias is not None:
                of_bias = bias[torch.where(used, index, 0).long()].to(wide) * grads.unsqueeze(1)
                grad_weights += of_bias.masked_fill(~used.unsqueeze(-1), 0).sum(-1)
        if wanted.grad_hidden:
            if weights is not None:
                found = (found * torch.where(used, weights, 0).view(-1, 1)).to(found.dtype)
            grad_hidden = combine_slots(found, index, experts) if whole else found.view(hidden_states.shape)
    if wanted.grad_weight:
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        grad_bias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        place = torch.arange(index.numel(), device=index.device)
        slot = torch.where(place < pairs.offsets[-1], pairs.slots, 0).long()  # what follows the last pair is undefined, and not read
        if weights is None:
            ones = torch.ones(tokens, slots, dtype=torch.float32, device=index.device)
            expert_outer(grads[slot], rows, ones, grad_weight, grad_bias, None, index, pairs, False)
        else:
            left = (rows[slot // slots if whole else slot] * weights.view(-1)[slot].unsqueeze(-1)).to(rows.dtype)
            expert_outer(left, grads, weights, grad_weight.mT, None, grad_bias, index, pairs, False)
    return LinearGradients(
        grad_hidden,
        grad_weight,
        None if grad_weights is None or top_k_weights is None else grad_weights.to(top_k_weights.dtype),
        grad_bias,
        _torch_linear.surprise_of(inputs, grad_out) if wanted.grad_probe else None,
    )
