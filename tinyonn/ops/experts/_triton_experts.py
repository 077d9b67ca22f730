"""Mixture of small experts on Triton: allocation and launches of the registered op. The host reads no number of pairs.

Memory per pair (token, slot), in the dtype of the tensors: `pre`, 2I values, is saved for backward. The forward also needs h, I values, and
a row of F. The backward needs the gradient of `pre`, h times the pair's weight, and a row of F; besides, with many pairs of small experts,
partial sums of at most half of the weights' bytes. It sorts the P pairs again instead of saving the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_its_device, without_autocast
from ._torch_experts import stored_surprise
from ._tuples import Gradients, Inputs, Layout, Saved, Wanted


@on_its_device
@without_autocast
def experts_forward(inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor]:
    """out (N, F), and `Saved.pre`, uninitialised after the last pair."""
    from tinyonn_kernels.experts.expert_activation import rows_of
    from tinyonn_kernels.experts.expert_mlp_fwd import expert_gate_up
    from tinyonn_kernels.experts.expert_rows import expert_rows
    from tinyonn_kernels.experts.expert_sort import sort_pairs

    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias = inputs
    up, down = (weight.mT if layout.transposed else weight for weight in (gate_up_proj, down_proj))  # (E, 2I, F), (E, F, I)
    experts, width, _ = up.shape
    pre = hidden_states.new_empty(top_k_index.numel(), width)
    if top_k_index.numel() == 0 or experts == 0:
        return hidden_states.new_zeros(hidden_states.shape), pre
    pairs = sort_pairs(top_k_index, experts, rows_of(top_k_index.numel(), experts, hidden_states.dtype))
    h = hidden_states.new_empty(top_k_index.numel(), down.shape[2])
    slots, interleaved = top_k_index.shape[1], layout.gated and layout.interleaved
    expert_gate_up(hidden_states, up, gate_up_bias, pre, h, pairs, slots, layout.activation, layout.gated, interleaved, layout.limit)
    weights = top_k_weights.float().contiguous()
    return expert_rows(h, down.mT, down_bias, weights, top_k_index.contiguous(), pairs, False), pre


@on_its_device
@without_autocast
def experts_backward(inputs: Inputs, saved: Saved, layout: Layout, wanted: Wanted) -> Gradients:
    """Gradients, None for those that are not wanted."""
    from tinyonn_kernels.experts.expert_activation import rows_of
    from tinyonn_kernels.experts.expert_mlp_bwd import expert_grad_pre
    from tinyonn_kernels.experts.expert_outer import expert_outer
    from tinyonn_kernels.experts.expert_rows import expert_rows
    from tinyonn_kernels.experts.expert_sort import sort_pairs

    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias = inputs
    surprise_kind = wanted.surprise_kind
    projections = (
        gate_up_proj if wanted.grad_gate_up else None, down_proj if wanted.grad_down else None,
        gate_up_bias if wanted.grad_gate_up else None, down_bias if wanted.grad_down else None,
    )  # fmt: skip
    weights, index = top_k_weights.float().contiguous(), top_k_index.contiguous()
    experts = len(gate_up_proj)
    if top_k_index.numel() == 0 or experts == 0 or hidden_states.shape[1] == 0:
        differentiated = (hidden_states if wanted.grad_hidden else None, *projections[:2], top_k_weights, *projections[2:])
        zeros = (None if x is None else x.new_zeros(x.shape) for x in differentiated)
        return Gradients._make((*zeros, None if surprise_kind is None else torch.zeros_like(weights)))
    up, down = (weight.mT if layout.transposed else weight for weight in (gate_up_proj, down_proj))  # (E, 2I, F), (E, F, I)
    interleaved = layout.gated and layout.interleaved
    pairs = sort_pairs(index, experts, rows_of(index.numel(), experts, hidden_states.dtype))
    grad_out = saved.grad_out.to(hidden_states.dtype)
    norm_kind = None if surprise_kind == "saving" else surprise_kind
    grad_pre, weighed_h, grad_weights, surprise = expert_grad_pre(
        hidden_states, grad_out, down, down_bias, saved.pre, weights, index, pairs, layout.activation, layout.gated, norm_kind,
        gate_up_bias is not None, layout.limit,
    )  # fmt: skip
    if surprise_kind == "saving":
        surprise = stored_surprise(-grad_weights, grad_weights.dtype)
    grad_hidden = expert_rows(grad_pre, up, None, None, index, pairs, interleaved) if wanted.grad_hidden else None
    grad_up, grad_down, grad_up_bias, grad_down_bias = (None if x is None else x.new_empty(x.shape) for x in projections)
    if grad_up is not None:
        target = grad_up.mT if layout.transposed else grad_up
        expert_outer(grad_pre, hidden_states, weights, target, grad_up_bias, None, index, pairs, interleaved)
    if grad_down is not None:
        target = grad_down if layout.transposed else grad_down.mT
        expert_outer(weighed_h, grad_out, weights, target, None, grad_down_bias, index, pairs, False)
    return Gradients(grad_hidden, grad_up, grad_down, grad_weights.to(top_k_weights.dtype), grad_up_bias, grad_down_bias, surprise)
