"""`expert_linear`: checks, registration, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from .._checks import check_float, check_no_nan, check_same_device, check_tensor
from .._dispatch import check_impl, choose_impl, parts_of, refuse_reference, refuse_tangents, register, schema_of, statistics_dtype
from . import _torch_linear, _triton_linear
from ._autograd import FORWARD_MODE, backward_of, each
from ._checks import check_index_range, check_index_type, check_probe
from ._linear_tuples import LinearGradients, LinearInputs, LinearOrder, LinearProbe, LinearSaved, LinearWanted
from ._torch_experts import stored_surprise
from .sort_slots import SlotOrder


def expert_linear(
    hidden_states: Tensor,
    weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    surprise: Tensor | None = None,
    order: SlotOrder | None = None,
    impl: str = "auto",
) -> Tensor:
    """One linear projection per (token, expert) pair: of each token by each of its experts. Backward also computes each pair's surprise.

    `expert_mlp` is two of these with an activation between them. The surprise of a pair is the norm of the gradient that its slot alone
    causes in the expert's weight and bias. It is returned as the gradient of `surprise`, a tensor of zeros that does not affect the output.

    Differentiable: hidden_states, weight, bias, top_k_weights; gradients that are not needed are not computed. Works under
    `torch.func.grad`, `vjp`, `jacrev` and `vmap`; `vmap` makes one call per element of its batch.

    Args:
        hidden_states: (N, F), one row for all slots of a token, or (N, K, F), a row for each slot. Rows of unused slots are not read.
        weight: (E, O, F).
        top_k_index: (N, K) int32 or int64; E in unused slots, which need memory but no arithmetic. Any other index out of range is an
            unused slot too, and an error under `tinyonn.debug()`.
        top_k_weights: (N, K); with them the slots of a token are weighed and summed. None for a result per slot.
        bias: (E, O).
        surprise: (N, K) zeros with `requires_grad`, float32, or float64 for float64 inputs; or None. An expert that a token names twice has
            a surprise in each slot.
        order: `sort_slots` of this index, so that several calls share one sort; None to sort here. It must have been made for this index,
            dtype and impl; impl="reference" ignores it.
        impl: "auto", "triton", "torch" or "reference"; see `expert_mlp`.

    Returns:
        (N, K, O) in the dtype of `hidden_states`, 0 in unused slots; (N, O) with `top_k_weights`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; `surprise` does not require grad although gradients are enabled;
            under `tinyonn.debug()`, an index out of range or a NaN.
        RuntimeError: impl="triton" cannot run here; forward-mode differentiation or a second derivative, which only impl="reference"
            supports.

    Source: grouped products after Gale et al., "MegaBlocks", arXiv:2211.15841; norms of single tokens' gradients after Goodfellow,
    "Efficient per-example gradient computations", arXiv:1510.01799.
    """
    check_impl(impl)
    inputs = LinearInputs(hidden_states, weight, top_k_index, top_k_weights, bias)
    _check_inputs(inputs)
    if surprise is not None:
        check_probe(surprise, top_k_index, hidden_states)
    if order is not None:
        _check_order(order, inputs)
    if impl == "reference":
        return _reference(inputs, surprise)
    refuse_tangents("expert_linear", *inputs, surprise)
    shape = top_k_index.shape
    if hidden_states.dim() == 3 and top_k_weights is None:  # slots are tokens with one expert
        inputs = inputs._replace(hidden_states=hidden_states.flatten(0, 1), top_k_index=top_k_index.reshape(-1, 1))
        surprise = None if surprise is None else surprise.reshape(-1, 1)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    out: Tensor = (_Linear.apply if transformed else _forward_op)(*inputs, *(LinearOrder() if order is None else order), surprise, impl)
    return out.view(*shape, weight.shape[1]) if top_k_weights is None else out


def _check_inputs(inputs: LinearInputs) -> None:
    hidden_states, weight, top_k_index, top_k_weights, bias = inputs
    check_float("hidden_states", hidden_states)
    check_float("weight", weight)
    check_index_type(top_k_index)
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must have shape (N, K), got {tuple(top_k_index.shape)}.")
    if weight.dim() != 3:
        raise ValueError(f"weight must have shape (E, O, F), got {tuple(weight.shape)}.")
    tokens, slots = top_k_index.shape
    features, device = weight.shape[2], hidden_states.device
    if tuple(hidden_states.shape) not in ((tokens, features), (tokens, slots, features)):
        raise ValueError(
            f"hidden_states must have shape ({tokens}, {features}) or ({tokens}, {slots}, {features}), got {tuple(hidden_states.shape)}."
        )
    check_tensor("weight", weight, device, weight.shape, hidden_states.dtype)
    if bias is not None:
        check_tensor("bias", bias, device, weight.shape[:2], hidden_states.dtype)
    check_same_device("top_k_index", top_k_index, device)
    if top_k_weights is not None:
        check_tensor("top_k_weights", top_k_weights, device, top_k_index.shape)


def _check_order(order: SlotOrder, inputs: LinearInputs) -> None:
    number, experts = inputs.top_k_index.numel(), len(inputs.weight)
    if order.slots.shape != (number,) or order.offsets.shape != (experts + 1,):
        raise ValueError(
            f"order must be sort_slots of this index, of {number} slots and {experts} experts, got one of {order.slots.numel()} and "
            f"{order.offsets.numel() - 1}."
        )
    check_same_device("order", order.slots, inputs.top_k_index.device)


def _check_values(inputs: LinearInputs) -> None:
    """ValueError if an index is out of range or a value is NaN. Reads the tensors: for `tinyonn.debug()`."""
    check_index_range(inputs.top_k_index, len(inputs.weight))
    for name in ("top_k_weights", "hidden_states", "weight"):
        if (x := getattr(inputs, name)) is not None:
            check_no_nan(name, x)


class _Probe(torch.autograd.Function):
    """Identity on `out`; its gradient for the probe is the surprise."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, surprise: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = LinearInputs(*ctx.saved_tensors)
        found = reference.linear_surprise(*inputs[:-1], grad_out, bias=inputs.bias)
        return grad_out, stored_surprise(found, statistics_dtype(inputs.hidden_states.dtype)), *([None] * len(inputs))


def _reference(inputs: LinearInputs, surprise: Tensor | None) -> Tensor:
    if debug_enabled():
        _check_values(inputs)
    out = reference.expert_linear(*inputs[:-1], bias=inputs.bias)
    if surprise is not None:
        out = _Probe.apply(out, surprise, *(None if x is None else x.detach() for x in inputs))
    return out.to(inputs.hidden_states.dtype)


def _forward(*arguments: Any) -> Tensor:
    inputs, order, _, impl = parts_of(arguments, LinearInputs, LinearOrder, LinearProbe)
    if debug_enabled():
        _check_values(inputs)
    match refuse_reference("expert_linear", choose_impl(impl, inputs.hidden_states)):
        case "triton":
            return _triton_linear.linear_forward(inputs, order)
        case "torch":
            return _torch_linear.linear_forward(inputs, order)


def _fake(*arguments: Any) -> Tensor:
    inputs, *_ = parts_of(arguments, LinearInputs, LinearOrder, LinearProbe)
    shape = inputs.top_k_index.shape if inputs.top_k_weights is None else inputs.top_k_index.shape[:1]
    return inputs.hidden_states.new_empty(*shape, inputs.weight.shape[1])


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, order, saved, wanted, impl = parts_of(arguments, LinearInputs, LinearOrder, LinearSaved, LinearWanted)
    match refuse_reference("expert_linear", choose_impl(impl, inputs.hidden_states)):
        case "triton":
            grads = _triton_linear.linear_backward(inputs, order, saved, wanted)
        case "torch":
            grads = _torch_linear.linear_backward(inputs, order, saved, wanted)
    none = inputs.hidden_states.new_empty(0, dtype=statistics_dtype(inputs.hidden_states.dtype))
    return tuple(none.clone() if grad is None else grad.contiguous() for grad in grads)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, wanted, _ = parts_of(arguments, LinearInputs, LinearOrder, LinearSaved, LinearWanted)
    none = inputs.hidden_states.new_empty(0, dtype=statistics_dtype(inputs.hidden_states.dtype))
    there = (wanted.grad_hidden, wanted.grad_weight, wanted.grad_weights, wanted.grad_weight)
    tensors = (getattr(inputs, name) for name in LinearGradients._fields[:-1])
    grads = [x.new_empty(x.shape) if x is not None and use else none.clone() for x, use in zip(tensors, there, strict=True)]
    return *grads, none.new_empty(inputs.top_k_index.shape) if wanted.grad_probe else none.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, order, _, ctx.impl = parts_of(inputs, LinearInputs, LinearOrder, LinearProbe)
    ctx.save_for_backward(*tensors, *order)


def _gradients_by(backward: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of the registered op; `backward` takes the arguments of `tinyonn::expert_linear_backward`."""
    hidden, weight, _, weights, bias, *_, probe, _ = ctx.needs_input_grad
    wanted = LinearWanted(hidden, weight or bias, weights, probe)
    found = backward(*ctx.saved_tensors, grad_out, *wanted, ctx.impl)
    used = (hidden, weight, weights, bias, probe)
    first, second, third, fourth, surprise = (grad if use else None for grad, use in zip(found, used, strict=True))
    return first, second, None, third, fourth, *[None] * len(LinearOrder._fields), surprise, None


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("expert_linear", grad_out)
    return _gradients_by(_backward_op, ctx, grad_out)


class _Linear(torch.autograd.Function):
    """Function of the arguments of `tinyonn::expert_linear`, for the transforms of torch.func."""

    setup_context = staticmethod(_save)

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _forward_op(*args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients_by(_LinearBackward.apply, ctx, grad_out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE.format("expert_linear"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        (stacked,), (dim,) = each(lambda *one: (_Linear.apply(*one),), info, in_dims, args)
        return stacked, dim


_LinearBackward = backward_of("expert_linear")
_forward_op = register("expert_linear", _forward, _fake, schema_of(LinearInputs, LinearOrder, LinearProbe, returns="Tensor"))
_backward_op = register(
    "expert_linear_backward",
    _backward,
    _fake_backward,
    schema_of(LinearInputs, LinearOrder, LinearSaved, LinearWanted, returns=LinearGradients),
)
_forward_op.register_autograd(_autograd, setup_context=_save)
