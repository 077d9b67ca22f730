"""Activations between the two products of an expert, with the gate, in plain torch.

P pairs (token, slot), I neurons of an expert
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._tuples import Layout

SWISH = 1.702  # of gpt-oss


def activate(pre: Tensor, layout: Layout) -> Tensor:
    """(P, 2I) -> (P, I), or (P, I) -> (P, I) without a gate."""
    if not layout.gated:
        return _activation(pre, layout)
    gate, up = _halves(pre, layout)
    return _activation(gate, layout) * _factor(up, layout)


def activate_backward(pre: Tensor, grad: Tensor, layout: Layout) -> Tensor:
    """Gradient of `pre`, given the gradient of the output of `activate`."""
    if not layout.gated:
        return _activation_backward(grad, pre, layout)
    gate, up = _halves(pre, layout)
    grad_pre = torch.empty_like(pre)
    grad_gate, grad_up = _halves(grad_pre, layout)
    grad_up.copy_(grad * _activation(gate, layout))
    if layout.limit:
        grad_up.masked_fill_(up.abs() > layout.limit, 0)
    grad_gate.copy_(_activation_backward(grad * _factor(up, layout), gate, layout))
    return grad_pre


def _factor(up: Tensor, layout: Layout) -> Tensor:
    """Factor of the gate's activation."""
    match layout.activation:
        case "clamped_swiglu":
            return up.clamp(-layout.limit, layout.limit) + 1
        case "clamped_silu":
            return up.clamp(-layout.limit, layout.limit)
    return up


def _halves(pre: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    if layout.interleaved:
        return pre[..., 0::2], pre[..., 1::2]
    gate, up = pre.chunk(2, -1)
    return gate, up


def _activation(x: Tensor, layout: Layout) -> Tensor:
    match layout.activation:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()
        case "clamped_silu":
            return functional.silu(x.clamp(max=layout.limit))
    x = x.clamp(max=layout.limit)
    return x * (SWISH * x).sigmoid()


def _activation_backward(grad: Tensor, x: Tensor, layout: Layout) -> Tensor:
    match layout.activation:
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "relu2":
            return grad * 2 * functional.relu(x)
        case "clamped_silu":
            return torch.ops.aten.silu_backward(grad, x).masked_fill_(x > layout.limit, 0)
    sigmoid = (SWISH * x).sigmoid()
    return torch.where(x > layout.limit, 0, grad * sigmoid * (1 + SWISH * x * (1 - sigmoid)))
