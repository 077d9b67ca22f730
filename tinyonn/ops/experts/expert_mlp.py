"""`expert_mlp` and `scatter_surprise`: checks, registration, dispatch."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from ... import reference
from ..._debug import debug_enabled
from ...reference.experts.expert_mlp import Activation, SurpriseKind
from .._dispatch import check_float, check_impl, check_same_device, choose_impl, statistics_dtype
from ..nsa._checks import refuse_tangents
from ._checks import check_index_type, check_inputs, check_probe, check_values, limit_of
from ._torch_experts import Layout, Wanted, experts_backward, experts_forward, stored_surprise


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
    """Mixture of small experts: the weighed sum of what each token's experts give, and in backward how surprised each was.

    The surprise of a (token, expert) pair is the norm of what this token alone would change in this expert. It is handed out as the
    gradient of `surprise`, a tensor of zeros that takes part in nothing: `surprise.grad` after backward, or through
    `torch.autograd.grad`. Gradients of several calls add up there, so give each call a probe of its own. It scales with the loss, and so
    with AMP's loss scale.

    Differentiable: hidden_states, both projections and their biases, top_k_weights; gradients that nobody asks for are not computed.
    `torch.func.grad`, `vjp`, `jacrev` and `vmap` take it; `vmap` makes one call for each element of its batch.

    Args:
        hidden_states: (N, F).
        gate_up_proj: (E, 2I, F), or (E, I, F) without a gate; (E, F, 2I) or (E, F, I) where `transposed`.
        down_proj: (E, F, I), or (E, I, F) where `transposed`.
        top_k_index: (N, K) int32 or int64; E in unused slots, which cost no arithmetic; memory is that of K slots. Any other index out of
            range is an unused slot too, and an error under `tinyonn.debug()`.
        top_k_weights: (N, K).
        activation: "silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu" of gpt-oss, (up + 1) · gate · σ(1.702 gate), or "clamped_silu" of
            DeepSeek-V4, up · silu(gate).
        gate_up_bias, down_bias: (E, 2I) or (E, I), and (E, F).
        gated: whether half of what the first product gives multiplies the other half.
        interleaved: gate and up alternate, instead of gate first.
        transposed: weights are (in, out).
        limit: above 0, of both clamped activations: the gate is at most this, up lies within ± this. None for 7 with "clamped_swiglu"
            and 10 with "clamped_silu"; the other activations take none.
        surprise: (N, K) zeros with `requires_grad`, float32, or float64 for float64 inputs; or None.
        surprise_kind: "down_proj", norm of the gradient of `down_proj[e]`; "expert", of all the expert's weights and biases; "output",
            |weight| · ‖grad_output‖, which for one token only ranks the weights. An expert named twice counts with its summed weight, in
            both slots. A surprise beyond the largest finite float32 is that one: infinity would say that the token did not go.
        impl: "auto", "triton", "torch" or "reference". With "triton", the default on a GPU but for float64, nothing waits for the device
            once a kind of input has been seen; "torch" reads the number of pairs of each expert. The reference computes every expert for
            every token, so a NaN in an expert or token that is not routed spreads there alone.

    Returns:
        (N, F) in the dtype of `hidden_states`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; `surprise` would get no gradient though gradients are on; under
            `tinyonn.debug()` an index out of range or a NaN.
        RuntimeError: impl="triton" cannot run here; a forward-mode tangent or a second derivative, which impl="reference" alone takes.

    Source: grouped products after Gale et al., "MegaBlocks", arXiv:2211.15841; norms of single tokens' gradients after Goodfellow,
    "Efficient per-example gradient computations", arXiv:1510.01799.
    """
    check_impl(impl)
    check_inputs(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias, gated, transposed)
    for name, value, choices in (
        ("activation", activation, get_args(Activation)),
        ("surprise_kind", surprise_kind, get_args(SurpriseKind)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    limit = limit_of(activation, limit)
    if surprise is not None:
        check_probe(surprise, top_k_index, hidden_states)
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias)
    if impl == "reference":
        layout = {"activation": activation, "gated": gated, "interleaved": interleaved, "transposed": transposed, "limit": limit}
        return _reference(*tensors, surprise, surprise_kind, layout)
    refuse_tangents("expert_mlp", *tensors, surprise)
    options = (activation, gated, interleaved, transposed, limit, surprise_kind, impl)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        from ._transforms import Experts

        out, _ = Experts.apply(*tensors, surprise, *options)
    else:
        out, _ = _forward(*tensors, surprise, *options)
    return out


class _Probe(torch.autograd.Function):
    """Passes `out` through; the gradient of the probe is the surprise."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, probe: Tensor, kind: SurpriseKind, layout: dict[str, Any], biases: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.biases, ctx.options = biases, {"kind": kind, **layout}
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, index, weight = ctx.saved_tensors
        hidden, up, down = tensors
        biases = {"gate_up_bias": ctx.biases[0], "down_bias": ctx.biases[1]}
        found = reference.expert_surprise(hidden, up, down, index, weight, grad_out, **biases, **ctx.options)
        return grad_out, stored_surprise(found, statistics_dtype(hidden.dtype)), *([None] * 8)


def _reference(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    surprise: Tensor | None,
    kind: SurpriseKind,
    layout: dict[str, Any],
) -> Tensor:
    num_experts = len(gate_up_proj)
    if debug_enabled():
        check_values(top_k_index, top_k_weights, num_experts, hidden_states, gate_up_proj, down_proj)
    index = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, num_experts).long()
    tensors = (hidden_states, gate_up_proj, down_proj, index, top_k_weights)
    out = reference.expert_mlp(*tensors, gate_up_bias=gate_up_bias, down_bias=down_bias, **layout)
    if surprise is not None:
        biases = tuple(None if bias is None else bias.detach() for bias in (gate_up_bias, down_bias))
        out = _Probe.apply(out, surprise, kind, layout, biases, *(x.detach() for x in tensors))
    return out.to(hidden_states.dtype)


def scatter_surprise(slots: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """Surprise of each slot as a matrix over all experts.

    Args:
        slots: (N, K), the gradient of the probe of `expert_mlp`.
        top_k_index: (N, K), as given to it.
        num_experts: E.

    Returns:
        (N, E), infinite where a token did not go.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not agree; num_experts is below 0.
    """
    check_float("slots", slots)
    check_index_type(top_k_index)
    check_same_device("top_k_index", top_k_index, slots.device)
    if not isinstance(num_experts, int) or num_experts < 0:
        raise ValueError(f"num_experts must be an int of at least 0, got {num_experts}.")
    if slots.shape != top_k_index.shape or slots.dim() != 2:
        raise ValueError(f"slots must have the shape (N, K) of top_k_index, {tuple(top_k_index.shape)}, got {tuple(slots.shape)}.")
    index = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, num_experts).long()
    whole = slots.new_full((slots.shape[0], num_experts + 1), math.inf).scatter(1, index, slots)
    return whole[:, :num_experts].contiguous()


@torch.library.custom_op("tinyonn::expert_mlp", mutates_args=())
def _forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    surprise: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float,
    surprise_kind: str,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out, and what the activation took: pairs sorted by expert; gate first with triton, as the weights lie with torch."""
    if debug_enabled():
        check_values(top_k_index, top_k_weights, len(gate_up_proj), hidden_states, gate_up_proj, down_proj)
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias)
    layout = Layout(activation, gated, interleaved, transposed, limit)
    if choose_impl(impl, hidden_states) == "triton":
        from . import _triton_experts

        return _triton_experts.experts_forward(*tensors, layout)
    return experts_forward(*tensors, layout)


@_forward.register_fake
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    surprise: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float,
    surprise_kind: str,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    width = gate_up_proj.shape[2 if transposed else 1]
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(top_k_index.numel(), width)


@torch.library.custom_op("tinyonn::expert_mlp_backward", mutates_args=())
def _backward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    grad_out: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float,
    surprise_kind: str | None,
    impl: str = "auto",
    grad_hidden: bool = True,
    grad_gate_up: bool = True,
    grad_down: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden_states, both projections, top_k_weights and both biases, and the surprise; empty where there is none.

    The last three say whether those of hidden_states, of the first projection and its bias, and of the second and its bias are computed.
    """
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias)
    rest = (
        pre,
        grad_out,
        Layout(activation, gated, interleaved, transposed, limit),
        surprise_kind,
        Wanted(grad_hidden, grad_gate_up, grad_down),
    )
    if choose_impl(impl, hidden_states) == "triton":
        from . import _triton_experts

        *grads, surprise = _triton_experts.experts_backward(*tensors, *rest)
    else:
        *grads, surprise = experts_backward(*tensors, *rest)
    none = hidden_states.new_empty(0, dtype=statistics_dtype(hidden_states.dtype))
    return tuple(none.clone() if x is None else x.contiguous() for x in (*grads, surprise))  # type: ignore[return-value]


@_backward.register_fake
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    grad_out: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float,
    surprise_kind: str | None,
    impl: str = "auto",
    grad_hidden: bool = True,
    grad_gate_up: bool = True,
    grad_down: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = statistics_dtype(hidden_states.dtype)
    inputs = (hidden_states, gate_up_proj, down_proj, top_k_weights, gate_up_bias, down_bias)
    there = (grad_hidden, grad_gate_up, grad_down, True, grad_gate_up, grad_down)
    grads = [
        x.new_empty(x.shape) if x is not None and use else hidden_states.new_empty(0, dtype=wide)
        for x, use in zip(inputs, there, strict=True)
    ]
    surprise = hidden_states.new_empty((0,) if surprise_kind is None else top_k_index.shape, dtype=wide)
    return *grads, surprise  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, probe = inputs[:8]
    *ctx.layout, kind, ctx.impl = inputs[8:]  # the layout and its limit
    ctx.kind = None if probe is None or not probe.requires_grad else kind
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents("expert_mlp", grad_out)
    *tensors, pre = ctx.saved_tensors
    hidden, up, down, _, weights, up_bias, down_bias, *_ = ctx.needs_input_grad
    wanted = (hidden, up or up_bias, down or down_bias)
    *grads, surprise = _backward(*tensors, pre, grad_out, *ctx.layout, ctx.kind, ctx.impl, *wanted)
    used = (hidden, up, down, weights, up_bias, down_bias)
    first, second, third, fourth, *biases = (grad if use else None for grad, use in zip(grads, used, strict=True))
    return first, second, third, None, fourth, *biases, None if ctx.kind is None else surprise, *([None] * 7)


_forward.register_autograd(_autograd, setup_context=_setup_context)
