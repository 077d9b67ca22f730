"""Registration of the ops of DynNSA with their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._attention import choose_attention_impl
from .._dispatch import parts_of, refuse_reference, refuse_tangents, register, schema_of, statistics_dtype
from ._checks import Bounds
from ._tuples import Attended


class Needed(NamedTuple):
    """Which of the tensors need their gradient."""

    needed: list[bool]


def register_differentiable(
    name: str,
    modules: tuple[ModuleType, ModuleType],
    forward: Callable[..., Sequence[Tensor]],
    fake: Callable[..., Sequence[Tensor]],
    backward: Callable[..., Sequence[Tensor | None]],
    *,
    tensors: Any,
    options: Any,
    results: Any,
    saved: Any,
    constants: Sequence[str] = (),
) -> torch.library.CustomOpDef:
    """Registers `tinyonn::name` and its derivative, `tinyonn::name_backward`.

    Args:
        modules: the torch and the Triton implementation; the functions below receive one of them.
        forward: (tensors, options, bounds, module) -> results.
        fake: (tensors, options) -> results without values.
        backward: (tensors, saved, options, bounds, needed, module) -> gradients of the tensors without `constants`, in any precision; may
            be None for those that are not `needed`.
        tensors, options, results: named tuples; `Bounds` and impl follow the options.
        saved: named tuple of the results that backward reads, followed by gradients, each named `grad_` and the result; a result without
            a gradient is not differentiable.
        constants: tensors without a gradient.
    """
    variables = [field for field in tensors._fields if field not in constants]
    kept = [results._fields.index(field) for field in saved._fields if field in results._fields]
    differentiable = [number for number, field in enumerate(results._fields) if f"grad_{field}" in saved._fields]

    def module_of(impl: str, query: Tensor) -> ModuleType:
        match refuse_reference(name, choose_attention_impl(impl, query)):
            case "torch":
                return modules[0]
            case "triton":
                return modules[1]

    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, impl = parts_of(arguments, tensors, options, Bounds)
        return tuple(forward(*given, module_of(impl, arguments[0])))

    def run_fake(*arguments: Any) -> tuple[Tensor, ...]:
        given, numbers, *_ = parts_of(arguments, tensors, options)
        return tuple(fake(given, numbers))

    def run_backward(*arguments: Any) -> list[Tensor]:
        given, *others, (needed,), impl = parts_of(arguments, tensors, saved, options, Bounds, Needed)
        grads = zip(variables, backward(given, *others, needed, module_of(impl, given.query)), needed, strict=True)
        return [
            grad.to(getattr(given, field).dtype) if need and grad is not None else given.query.new_empty(0) for field, grad, need in grads
        ]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        given, _, _, _, (needed,), _ = parts_of(arguments, tensors, saved, options, Bounds, Needed)
        likes = zip((getattr(given, field) for field in variables), needed, strict=True)
        return [x.new_empty(x.shape) if need else given.query.new_empty(0) for x, need in likes]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given, ctx.options, bounds, ctx.impl = parts_of(inputs, tensors, options, Bounds)
        ctx.save_for_backward(*given, *(output[number] for number in kept), *bounds)
        ctx.mark_non_differentiable(*(x for number, x in enumerate(output) if number not in differentiable))

    def autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [grads[number] for number in differentiable]
        refuse_tangents(name, *wanted)
        given, *others = parts_of(ctx.saved_tensors, tensors)
        needed = [ctx.needs_input_grad[tensors._fields.index(field)] for field in variables]
        bounds = others[len(kept) :]
        found = backward_op(*given, *others[: len(kept)], *wanted, *ctx.options, *bounds, needed, ctx.impl)
        by_name = {field: grad for field, grad, need in zip(variables, found, needed, strict=True) if need}
        return *map(by_name.get, tensors._fields), *([None] * (len(ctx.options) + len(bounds) + 1))

    forward_op = register(name, run_forward, run_fake, schema_of(tensors, options, Bounds, returns=results))
    schema = schema_of(tensors, saved, options, Bounds, Needed, returns="Tensor[]")
    backward_op = register(f"{name}_backward", run_backward, fake_backward, schema)
    forward_op.register_autograd(autograd, setup_context=setup_context)
    return forward_op


def empty_attended(inputs: Any, _: Any) -> Attended:
    """Results of an op that returns out and lse, without values."""
    query = inputs.query
    return Attended(query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype)))
