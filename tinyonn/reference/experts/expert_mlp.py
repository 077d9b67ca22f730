"""Dense mixture of small experts: every expert for every token, in float64, differentiated by autograd.

    pre_e = x W_e^T + b_e                     W = gate_up_proj, (2I, F), or (I, F) without a gate
    h_e   = act(gate) · up                    act(pre) without a gate
    o_e   = h_e V_e^T + c_e                   V = down_proj, (F, I)
    out   = Σ weight · o_e               over a token's slots

N tokens, F features, E experts, I neurons of an expert, K slots of a token
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu", "clamped_silu"]
SurpriseKind = Literal["down_proj", "expert", "output", "saving"]
Layout = tuple[Activation, bool, bool, float | None]  # of `activate`
SWISH = 1.702  # value of gpt-oss
LIMITS = {"clamped_swiglu": 7.0, "clamped_silu": 10.0}  # values of gpt-oss and of DeepSeek-V4


def activate(pre: Tensor, activation: Activation, gated: bool, interleaved: bool, limit: float | None = None) -> Tensor:
    """(..., 2I) -> (..., I), or (..., I) -> (..., I) without a gate.

    Gate and up are the halves of `pre`, or its even and odd elements if `interleaved`. Both clamped activations clamp the gate to at most
    `limit` and `up` to ±`limit`: "clamped_swiglu" is (up + 1) · gate · σ(1.702 gate), "clamped_silu" is up · silu(gate). None for the value
    in `LIMITS`.
    """
    gate, up = pre, None
    if gated:
        gate, up = (pre[..., 0::2], pre[..., 1::2]) if interleaved else pre.chunk(2, -1)
    if activation in LIMITS:
        limit = LIMITS[activation] if limit is None else limit
        gate, up = gate.clamp(max=limit), None if up is None else up.clamp(-limit, limit)
    if up is not None and activation == "clamped_swiglu":
        up = up + 1
    found = _ACTIVATIONS[activation](gate)
    return found if up is None else found * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
    "clamped_swiglu": lambda x: x * (SWISH * x).sigmoid(),
    "clamped_silu": functional.silu,
}


def _dense(
    hidden_states: Tensor, projections: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None], transposed: bool, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """pre (N, E, 2I), h (N, E, I), o (N, E, F)."""
    up, down = (weight.double().mT if transposed else weight.double() for weight in projections)
    gate_up_bias, down_bias = biases
    pre = torch.einsum("nf,eif->nei", hidden_states.double(), up)
    if gate_up_bias is not None:
        pre = pre + gate_up_bias.double()
    h = activate(pre, *layout)
    out = torch.einsum("nei,efi->nef", h, down)
    return pre, h, out if down_bias is None else out + down_bias.double()


def pair_weights(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    """Summed weight of each expert over a token's slots, (N, E); the sentinel E is ignored."""
    whole = top_k_weights.new_zeros(len(top_k_index), num_experts + 1).scatter_add(1, top_k_index.long(), top_k_weights)
    return whole[:, :num_experts].double()


def expert_mlp(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: Activation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
) -> Tensor:
    """Weighted sum of the outputs of each token's experts.

    Args:
        hidden_states: (N, F).
        gate_up_proj: (E, 2I, F), or (E, I, F) without a gate; the last two dimensions are swapped if `transposed`.
        down_proj: (E, F, I), or (E, I, F) if `transposed`.
        top_k_index: (N, K), E in unused slots.
        top_k_weights: (N, K).
        activation, gated, interleaved, limit: see `activate`.
        gate_up_bias, down_bias: (E, 2I) and (E, F), or None.

    Returns:
        (N, F) float64.
    """
    layout = (activation, gated, interleaved, limit)
    _, _, out = _dense(hidden_states, (gate_up_proj, down_proj), (gate_up_bias, down_bias), transposed, layout)
    return torch.einsum("ne,nef->nf", pair_weights(top_k_index, top_k_weights, len(gate_up_proj)), out)


def expert_surprise(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    grad_output: Tensor,
    *,
    kind: SurpriseKind = "down_proj",
    activation: Activation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
) -> Tensor:
    """Norm of the gradient that one token alone contributes to one expert.

    Args:
        grad_output: (N, F), gradient of the loss with respect to the output of `expert_mlp`.
        kind: "down_proj", norm of the gradient of `down_proj[e]`; "expert", norm of the gradient of all the expert's weights and biases;
            "output", norm of the gradient of the expert's output, |weight| · ‖grad_output‖; "saving", −⟨grad_output, o⟩ with the expert's
            output o before its weight, negative where the expert raises the loss.
        others: as in `expert_mlp`.

    Returns:
        Surprise of each slot's (token, expert) pair, (N, K) float64; an expert that appears twice has its summed weight. Unused
        slots have 0.
    """
    num_experts = len(gate_up_proj)
    layout = (activation, gated, interleaved, limit)
    with torch.enable_grad():
        x, up, down = (tensor.detach().double() for tensor in (hidden_states, gate_up_proj, down_proj))
        up_bias, bias = (None if tensor is None else tensor.detach() for tensor in (gate_up_bias, down_bias))
        pre, h, out = _dense(x, (up, down), (up_bias, bias), transposed, layout)
        weights = pair_weights(top_k_index, top_k_weights.detach(), num_experts)
        grad = weights.unsqueeze(-1) * grad_output.detach().double().unsqueeze(1)  # gradient of o_e, (N, E, F)
        if kind == "saving":
            found = -torch.einsum("nf,nef->ne", grad_output.detach().double(), out)
        elif kind == "output":
            found = grad.norm(dim=-1)
        elif kind == "down_proj":
            found = grad.norm(dim=-1) * h.norm(dim=-1)
        else:
            leaf = pre.detach().requires_grad_()
            grad_h = torch.einsum("nef,efi->nei", grad, down.mT if transposed else down)
            (grad_pre,) = torch.autograd.grad(activate(leaf, *layout), leaf, grad_h)
            squares = grad_pre.square().sum(-1) * (x.square().sum(-1, keepdim=True) + (up_bias is not None))
            found = (squares + grad.square().sum(-1) * (h.square().sum(-1) + (bias is not None))).sqrt()
    return functional.pad(found.detach(), (0, 1)).gather(1, top_k_index.long())


def scatter_surprise(slots: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """(N, K) -> (N, E), infinite for experts that did not see the token."""
    whole = slots.new_full((len(slots), num_experts + 1), math.inf).scatter(1, top_k_index.long(), slots)
    return whole[:, :num_experts]
