"""`expert_mlp` and `scatter_surprise`: checks, registration, dispatch."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from ...reference.experts.expert_mlp import Activation, SurpriseKind
from .._checks import check_choice, check_flag, check_float, check_same_device, check_size
from .._dispatch import check_impl, choose_impl, parts_of, refuse_reference, refuse_tangents, register, schema_of, statistics_dtype
from . import _torch_experts, _triton_experts
from ._autograd import Experts, gradients_by, save_for_backward
from ._checks import check_index_type, check_inputs, check_probe, check_values, limit_of
from ._torch_experts import stored_surprise
from ._tuples import Gradients, Inputs, Layout, Probe, Saved, Wanted


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
    surprise: Tensor | None = None,
    surprise_kind: SurpriseKind = "down_proj",
    impl: str = "auto",
) -> Tensor:
    """Mixture of small experts: the weighted sum of the outputs of each token's experts. Backward also computes each pair's surprise.

    The surprise of a (token, expert) pair is the norm of the gradient that this token alone causes in the expert's output projection; see
    `surprise_kind` for other kinds. It is returned as the gradient of `surprise`, a tensor of zeros that does not affect the output: read
    `surprise.grad` after backward, or use `torch.autograd.grad`. Gradients of several calls add up, so pass a new tensor to each call.
    Surprise scales with the loss, and so with the loss scale of AMP.

    Differentiable: hidden_states, both projections and their biases, top_k_weights; gradients that are not needed are not computed.
    Works under `torch.func.grad`, `vjp`, `jacrev` and `vmap`; `vmap` makes one call per element of its batch.

    Args:
        hidden_states: (N, F).
        gate_up_proj: (E, 2I, F), or (E, I, F) without a gate; (E, F, 2I) or (E, F, I) if `transposed`.
        down_proj: (E, F, I), or (E, I, F) if `transposed`.
        top_k_index: (N, K) int32 or int64; E in unused slots, which need memory but no arithmetic. Any other index out of range is an
            unused slot too, and an error under `tinyonn.debug()`.
        top_k_weights: (N, K).
        activation: "silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu" of gpt-oss, (up + 1) · gate · σ(1.702 gate), or "clamped_silu" of
            DeepSeek-V4, up · silu(gate).
        gate_up_bias, down_bias: (E, 2I) or (E, I), and (E, F).
        gated: whether one half of the first product, after the activation, multiplies the other half.
        interleaved: whether rows of gate and up alternate; False if all gate rows come first.
        transposed: whether weights are (in, out).
        limit: bound of the two clamped activations, above 0: the gate is clamped to at most this value, `up` to ± this value. None for
            7 with "clamped_swiglu" and 10 with "clamped_silu"; must be None for the other activations.
        surprise: (N, K) zeros with `requires_grad`, float32, or float64 for float64 inputs; or None.
        surprise_kind: "down_proj", norm of the gradient of `down_proj[e]`; "expert", norm of the gradient of all the expert's weights and
            biases; "output", |weight| · ‖grad_output‖, which for one token only ranks the weights. An expert that appears twice in a
            token's slots has its summed weight, in both slots. A surprise above the largest finite float32 is set to that value, because
            infinity marks experts that did not see the token. "saving" has a sign: −⟨grad_output, o⟩ with the expert's output o before
            its weight, which is minus the gradient of the weight, in its precision. Times the weight it is, to first order, what the
            loss would rise by without the pair; it is negative where the expert does harm.
        impl: "auto", "triton", "torch" or "reference". "triton", the default on a GPU except for float64, does not synchronise with the
            device after the first call with a kind of input; "torch" reads the number of pairs of each expert. Only "reference" computes
            every expert for every token, so only there does a NaN in an expert spread to tokens that are not routed to it.

    Returns:
        (N, F) in the dtype of `hidden_states`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; `surprise` does not require grad although gradients are enabled;
            under `tinyonn.debug()`, an index out of range or a NaN.
        RuntimeError: impl="triton" cannot run here; forward-mode differentiation or a second derivative, which only impl="reference"
            supports.

    Source: grouped products after Gale et al., "MegaBlocks", arXiv:2211.15841; norms of single tokens' gradients after Goodfellow,
    "Efficient per-example gradient computations", arXiv:1510.01799.
    """
    check_impl(impl)
    for name, flag in (("gated", gated), ("interleaved", interleaved), ("transposed", transposed)):
        check_flag(name, flag)
    inputs = Inputs(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias)
    check_inputs(inputs, gated, transposed)
    check_choice("activation", activation, get_args(Activation))
    check_choice("surprise_kind", surprise_kind, get_args(SurpriseKind))
    layout = Layout(activation, gated, interleaved, transposed, limit_of(activation, limit))
    if surprise is not None:
        check_probe(surprise, top_k_index, hidden_states)
    probe = Probe(surprise, surprise_kind)
    if impl == "reference":
        return _reference(inputs, probe, layout)
    refuse_tangents("expert_mlp", *inputs, surprise)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    out, _ = (Experts.apply if transformed else _forward_op)(*inputs, *probe, *layout, impl)
    return out


def _check_kinds(activation: str, surprise_kind: str | None) -> None:
    """Again, for callers of `torch.ops.tinyonn`."""
    check_choice("activation", activation, get_args(Activation))
    if surprise_kind is not None:
        check_choice("surprise_kind", surprise_kind, get_args(SurpriseKind))


class _Probe(torch.autograd.Function):
    """Identity on `out`; its gradient for the probe is the surprise."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, surprise: Tensor, kind: SurpriseKind, layout: Layout, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.kind, ctx.layout = kind, layout
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        found = reference.expert_surprise(**inputs._asdict(), grad_output=grad_out, kind=ctx.kind, **ctx.layout._asdict())
        return grad_out, stored_surprise(found, statistics_dtype(inputs.hidden_states.dtype)), *([None] * (2 + len(inputs)))


def _reference(inputs: Inputs, probe: Probe, layout: Layout) -> Tensor:
    if debug_enabled():
        check_values(inputs)
    index, num_experts = inputs.top_k_index, inputs.gate_up_proj.shape[0]
    inputs = inputs._replace(top_k_index=torch.where((index >= 0) & (index < num_experts), index, num_experts).long())
    named: dict[str, Any] = {**inputs._asdict(), **layout._asdict()}
    out = reference.expert_mlp(**named)
    if probe.surprise is not None:
        out = _Probe.apply(out, *probe, layout, *(None if x is None else x.detach() for x in inputs))
    return out.to(inputs.hidden_states.dtype)


def scatter_surprise(slots: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """Scatters the surprise of each slot into a matrix over all experts.

    Args:
        slots: (N, K), the gradient of the probe of `expert_mlp`.
        top_k_index: (N, K), the indices passed to that call.
        num_experts: E.

    Returns:
        (N, E), infinite for experts that did not see the token.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; num_experts is below 0.
    """
    check_float("slots", slots)
    check_index_type(top_k_index)
    check_same_device("top_k_index", top_k_index, slots.device)
    check_size("num_experts", num_experts, least=0)
    if slots.shape != top_k_index.shape or slots.dim() != 2:
        raise ValueError(f"slots must have the shape (N, K) of top_k_index, {tuple(top_k_index.shape)}, got {tuple(slots.shape)}.")
    index = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, num_experts).long()
    whole = slots.new_full((slots.shape[0], num_experts + 1), math.inf).scatter(1, index, slots)
    return whole[:, :num_experts].contiguous()


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """out, and `Saved.pre`."""
    inputs, probe, layout, impl = parts_of(arguments, Inputs, Probe, Layout)
    _check_kinds(layout.activation, probe.surprise_kind)
    if debug_enabled():
        check_values(inputs)
    match refuse_reference("expert_mlp", choose_impl(impl, inputs.hidden_states)):
        case "triton":
            return _triton_experts.experts_forward(inputs, layout)
        case "torch":
            return _torch_experts.experts_forward(inputs, layout)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _, layout, _ = parts_of(arguments, Inputs, Probe, Layout)
    hidden_states, width = inputs.hidden_states, inputs.gate_up_proj.shape[2 if layout.transposed else 1]
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(inputs.top_k_index.numel(), width)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, layout, wanted, impl = parts_of(arguments, Inputs, Saved, Layout, Wanted)
    hidden_states = inputs.hidden_states
    _check_kinds(layout.activation, wanted.surprise_kind)
    match refuse_reference("expert_mlp", choose_impl(impl, hidden_states)):
        case "triton":
            grads = _triton_experts.experts_backward(inputs, saved, layout, wanted)
        case "torch":
            grads = _torch_experts.experts_backward(inputs, saved, layout, wanted)
    none = hidden_states.new_empty(0, dtype=statistics_dtype(hidden_states.dtype))
    return tuple(none.clone() if grad is None else grad.contiguous() for grad in grads)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, wanted, _ = parts_of(arguments, Inputs, Saved, Layout, Wanted)
    _, hidden, up, down = wanted
    none = inputs.hidden_states.new_empty(0, dtype=statistics_dtype(inputs.hidden_states.dtype))
    there = (hidden, up, down, True, up, down)
    tensors = (getattr(inputs, name) for name in Gradients._fields[:-1])
    grads = [x.new_empty(x.shape) if x is not None and use else none.clone() for x, use in zip(tensors, there, strict=True)]
    return *grads, none if wanted.surprise_kind is None else none.new_empty(inputs.top_k_index.shape)


def _autograd(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("expert_mlp", grad_out)
    return gradients_by(_backward_op, ctx, grad_out)


_forward_op = register("expert_mlp", _forward, _fake, schema_of(Inputs, Probe, Layout, returns=2))
_backward_op = register("expert_mlp_backward", _backward, _fake_backward, schema_of(Inputs, Saved, Layout, Wanted, returns=Gradients))
_forward_op.register_autograd(_autograd, setup_context=save_for_backward)
