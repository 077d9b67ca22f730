"""Dense form of one projection per (token, expert) pair: every expert for every row, in float64, differentiated by autograd.

    o_tk = W_e x + b_e      e the expert of slot k of token t, x the row of the token or of the slot; 0 in an unused slot
    out  = o_tk, or Σ_k weight_tk · o_tk with weights

N tokens, F features, E experts, O outputs, K slots of a token
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _chosen(top_k_index: Tensor, num_experts: int) -> Tensor:
    """(N, K, E) float64, 1 for the expert of each slot."""
    index = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, num_experts).long()
    return functional.one_hot(index, num_experts + 1)[..., :num_experts].double()


def expert_linear(
    hidden_states: Tensor, weight: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """Projection of each token by each of its experts.

    Args:
        hidden_states: (N, F), a row for all slots of a token, or (N, K, F), a row for each slot.
        weight: (E, O, F).
        top_k_index: (N, K); any index outside 0 … E - 1 is an unused slot.
        top_k_weights: (N, K); with them the slots of a token are summed.
        bias: (E, O).

    Returns:
        (N, K, O) float64, or (N, O) with weights.
    """
    chosen = _chosen(top_k_index, len(weight))
    rows = "nf" if hidden_states.dim() == 2 else "nkf"
    every = torch.einsum(f"{rows},eof->{rows[:-1]}eo", hidden_states.double(), weight.double())
    out = torch.einsum(f"nke,{rows[:-1]}eo->nko", chosen, every)
    if bias is not None:
        out = out + torch.einsum("nke,eo->nko", chosen, bias.double())
    return out if top_k_weights is None else torch.einsum("nk,nko->no", top_k_weights.double(), out)


def linear_surprise(
    hidden_states: Tensor,
    weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    grad_output: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Norm of the gradient that each slot alone causes in its expert's weight and bias, (N, K) float64; 0 in unused slots.

    `grad_output` has the shape of the output of `expert_linear`.
    """
    used = (top_k_index >= 0) & (top_k_index < len(weight))
    grads = grad_output.double()
    if top_k_weights is not None:
        grads = grads.unsqueeze(1) * top_k_weights.double().unsqueeze(-1)
    squares = hidden_states.double().square().sum(-1) + (bias is not None)
    size = grads.norm(dim=-1) * (squares if squares.dim() == 2 else squares.unsqueeze(-1)).sqrt()
    return torch.where(used, size, 0.0)
