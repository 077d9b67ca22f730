"""One projection per (token, expert) pair in plain torch: pairs are sorted by expert once, and multiplied a chunk of experts at a time.

P pairs, N tokens, F features, E experts, O outputs, K slots of a token
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import statistics_dtype, without_autocast
from .._torch_norms import row_norms
from ._huge_pages import empty_on_huge_pages
from ._linear_tuples import LinearGradients, LinearInputs, LinearOrder, LinearSaved, LinearWanted
from ._torch_experts import (
    Pairs,
    chunks_of,
    combine,
    grouped,
    in_slots,
    outer_into,
    pairs_by_order,
    pairs_of,
    stored_surprise,
    sum_by_expert,
)


def _rows(x: Tensor, pairs: Pairs, part: slice) -> Tensor:
    """Rows of pairs: (N, ·) by token, (N, K, ·) by slot."""
    return x.index_select(0, pairs.token[part]) if x.dim() == 2 else x.flatten(0, 1).index_select(0, pairs.slot[part])


def _by_slot(rows: Tensor, pairs: Pairs) -> Tensor:
    """(N, K, ·) of rows (P + 1, ·); 0 in unused slots."""
    rows[-1] = 0
    return rows.index_select(0, pairs.places.reshape(-1)).unflatten(0, pairs.places.shape)


def _sorted(top_k_index: Tensor, num_experts: int, order: LinearOrder) -> Pairs:
    if order.slots is None or order.offsets is None:
        return pairs_of(top_k_index, num_experts)
    return pairs_by_order(top_k_index, num_experts, order.slots, order.offsets)


class TokenSums:
    """Sums over the slots of each token, (N, ·), of rows that come chunk by chunk.

    A CPU adds them as they come, in float32 or float64, so that no row is kept: always in the same order. Elsewhere additions come in any
    order, so rows are kept, and summed by slot.
    """

    def __init__(self, like: Tensor, pairs: Pairs, features: int, weights: Tensor | None) -> None:
        self._pairs, self._weights, self._dtype = pairs, weights, like.dtype
        wide = statistics_dtype(like.dtype)
        self._added = like.device.type == "cpu"
        if self._added:
            self._rows = like.new_zeros(len(pairs.places), features, dtype=wide)
            self._of_rows = None if weights is None else weights.to(wide).reshape(-1)[pairs.slot].unsqueeze(-1)
        else:
            self._rows = like.new_empty(len(pairs.slot) + 1, features)

    def add(self, rows: Tensor, part: slice) -> None:
        if not self._added:
            self._rows[part] = rows
            return
        rows = rows.to(self._rows.dtype)
        self._rows.index_add_(0, self._pairs.token[part], rows if self._of_rows is None else rows * self._of_rows[part])

    def total(self) -> Tensor:
        return (self._rows if self._added else combine(self._rows, self._pairs, self._weights)).to(self._dtype)


@without_autocast
def linear_forward(inputs: LinearInputs, order: LinearOrder) -> Tensor:
    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    pairs = _sorted(top_k_index, len(weight), order)
    summing = None if top_k_weights is None else TokenSums(hidden_states, pairs, weight.shape[1], top_k_weights)
    rows = hidden_states.new_empty(len(pairs.slot) + 1 if summing is None else 0, weight.shape[1])
    for chunk in chunks_of(pairs, hidden_states.shape[-1], weight.shape[1]):
        found = grouped(_rows(hidden_states, pairs, chunk.rows), weight.mT[chunk.experts], chunk)
        if bias is not None:
            found += bias.index_select(0, pairs.expert[chunk.rows])
        if summing is None:
            rows[chunk.rows] = found
        else:
            summing.add(found, chunk.rows)
    return _by_slot(rows, pairs) if summing is None else summing.total()


@without_autocast
def linear_backward(inputs: LinearInputs, order: LinearOrder, saved: LinearSaved, wanted: LinearWanted) -> LinearGradients:
    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    pairs = _sorted(top_k_index, len(weight), order)
    number, features = len(pairs.slot), hidden_states.shape[-1]
    wide = statistics_dtype(hidden_states.dtype)
    grad_out = saved.grad_out.contiguous().to(hidden_states.dtype)
    weights = None if top_k_weights is None else top_k_weights.to(wide).reshape(-1)[pairs.slot].unsqueeze(-1)

    of_tokens = hidden_states.dim() == 2
    summing = TokenSums(hidden_states, pairs, features, None) if wanted.grad_hidden and of_tokens else None
    rows = hidden_states.new_empty(number + 1 if wanted.grad_hidden and not of_tokens else 0, features)
    grad_weight = empty_on_huge_pages(weight.shape, weight) if wanted.grad_weight else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted.grad_weight else None
    grad_weights = torch.empty(number, dtype=wide, device=rows.device) if wanted.grad_weights else None
    for chunk in chunks_of(pairs, features, weight.shape[1]):
        part = chunk.rows
        grad = _rows(grad_out, pairs, part)
        if wanted.grad_hidden or grad_weights is not None:
            found = grouped(grad, weight[chunk.experts], chunk)
            if grad_weights is not None:
                grad_weights[part] = (found.to(wide) * _rows(hidden_states, pairs, part)).sum(-1)
                if bias is not None:
                    grad_weights[part] += (grad.to(wide) * bias.index_select(0, pairs.expert[part])).sum(-1)
            if wanted.grad_hidden:
                found = found if weights is None else (found * weights[part]).to(found.dtype)
                if summing is None:
                    rows[part] = found
                else:
                    summing.add(found, part)
        if grad_weight is not None:
            weighed = grad if weights is None else (grad * weights[part]).to(grad.dtype)
            outer_into(grad_weight[chunk.experts], weighed, _rows(hidden_states, pairs, part), chunk)
            if grad_bias is not None:
                grad_bias[chunk.experts] = sum_by_expert(weighed, chunk, wide)

    grad_hidden = None
    if wanted.grad_hidden:
        grad_hidden = _by_slot(rows, pairs) if summing is None else summing.total()
    return LinearGradients(
        grad_hidden,
        grad_weight,
        None if grad_weights is None or top_k_weights is None else in_slots(grad_weights, pairs).to(top_k_weights.dtype),
        grad_bias,
        surprise_of(inputs, grad_out) if wanted.grad_probe else None,
    )


def surprise_of(inputs: LinearInputs, grad_out: Tensor) -> Tensor:
    """(N, K): |weight| · ‖gradient of the pair's row‖ · ‖row, and 1 for a bias‖; 0 in unused slots."""
    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    # Products in float64: squares and intermediate products can leave the range of float32.
    norms, grads = row_norms(hidden_states.reshape(-1, hidden_states.shape[-1])).double(), row_norms(grad_out.reshape(-1, weight.shape[1]))
    size = (norms.square() + (bias is not None)).sqrt().view(hidden_states.shape[:-1])
    size = size if size.dim() == 2 else size.unsqueeze(-1)
    found = size * (grads.double().view(grad_out.shape[:-1]) if top_k_weights is None else grads.double().unsqueeze(-1))
    if top_k_weights is not None:
        found = found * top_k_weights.double().abs()
    used = (top_k_index >= 0) & (top_k_index < len(weight))
    return torch.where(used, stored_surprise(found, statistics_dtype(hidden_states.dtype)), 0)
