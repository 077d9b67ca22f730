"""`expert_mlp` under the transforms of torch.func, which take no operator that was registered with an autograd formula.

Forward and backward are Functions here: `grad`, `vjp` and `jacrev` differentiate the first by the second, `vmap` calls both once for each
element of its batch, since each has experts, or gradients of experts, of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FORWARD_MODE = "expert_mlp must be differentiated by reverse mode, got a forward-mode tangent: use vjp, or impl='reference'."


def _each(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
    """One call for each element of the batch, stacked."""
    results = [
        function(*(x if dim is None else x.select(dim, number) for x, dim in zip(args, in_dims, strict=True)))
        for number in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class Experts(torch.autograd.Function):
    """Arguments of `tinyonn::expert_mlp`: seven tensors, the probe, five of the layout, the kind of surprise, the implementation."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, pre = torch.ops.tinyonn.expert_mlp(*args)
        return out, pre

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, probe = inputs[:8]
        ctx.layout, ctx.impl = inputs[8:13], inputs[14]
        ctx.kind = None if probe is None else inputs[13]
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, pre = ctx.saved_tensors
        needed = ctx.needs_input_grad[:8]
        hidden, up, down, _index, weights, up_bias, down_bias, probe = needed
        kind = ctx.kind if probe else None
        grads = ExpertsBackward.apply(*tensors, pre, grad_out, *ctx.layout, kind, ctx.impl, hidden, up or up_bias, down or down_bias)
        used = (hidden, up, down, weights, up_bias, down_bias, kind is not None)
        first, second, third, fourth, *rest = (grad if use else None for grad, use in zip(grads, used, strict=True))
        return first, second, third, None, fourth, *rest, *([None] * 7)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _each(Experts.apply, info, in_dims, args)


class ExpertsBackward(torch.autograd.Function):
    """Arguments of `tinyonn::expert_mlp_backward`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.tinyonn.expert_mlp_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("expert_mlp must be differentiated once, got a second derivative; impl='reference' takes it.")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _each(ExpertsBackward.apply, info, in_dims, args)
