"""Derivatives of `expert_mlp`: of the registered op, and of Functions for the transforms of torch.func.

The transforms reject an operator that was registered with an autograd formula. `grad`, `vjp` and `jacrev` differentiate the Function
`Experts` by `ExpertsBackward`. `vmap` calls either once for each element of its batch, because each element has its own experts or
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dispatch import parts_of
from ._tuples import Gradients, Inputs, Layout, Probe, Wanted

FORWARD_MODE = "{} does not support forward-mode differentiation: use vjp, or impl='reference'."


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """`setup_context` of the registered op and of `Experts`."""
    tensors, probe, ctx.layout, ctx.impl = parts_of(inputs, Inputs, Probe, Layout)
    ctx.kind = probe.surprise_kind
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def gradients_by(backward: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of the registered op; `backward` takes the arguments of `tinyonn::expert_mlp_backward`."""
    *tensors, pre = ctx.saved_tensors
    needed = Inputs(*ctx.needs_input_grad[: len(Inputs._fields)])
    probe = ctx.needs_input_grad[len(Inputs._fields)]
    hidden, up, down, weights, up_bias, down_bias = (getattr(needed, name) for name in Gradients._fields[:-1])
    wanted = Wanted(ctx.kind if probe else None, hidden, up or up_bias, down or down_bias)
    grads = backward(*tensors, pre, grad_out, *ctx.layout, *wanted, ctx.impl)
    used = (hidden, up, down, weights, up_bias, down_bias, probe)
    first, second, third, *rest = (grad if use else None for grad, use in zip(grads, used, strict=True))
    return first, second, third, None, *rest, *([None] * (2 + len(Layout._fields)))


def each(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
    """One call for each element of the batch, stacked."""
    results = [
        function(*(x if dim is None else x.select(dim, number) for x, dim in zip(args, in_dims, strict=True)))
        for number in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class Experts(torch.autograd.Function):
    """Function of the arguments of `tinyonn::expert_mlp`."""

    setup_context = staticmethod(save_for_backward)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, pre = torch.ops.tinyonn.expert_mlp(*args)
        return out, pre

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return gradients_by(ExpertsBackward.apply, ctx, grad_out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE.format("expert_mlp"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return each(Experts.apply, info, in_dims, args)


def backward_of(op: str) -> type[torch.autograd.Function]:
    """Function of the arguments of `tinyonn::{op}_backward`."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(getattr(torch.ops.tinyonn, f"{op}_backward")(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            return None

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            raise RuntimeError(f"{op} does not support second derivatives: use impl='reference'.")

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(FORWARD_MODE.format(op))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return each(Backward.apply, info, in_dims, args)

    return Backward


ExpertsBackward = backward_of("expert_mlp")
