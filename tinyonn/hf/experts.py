"""`experts_implementation="tinyonn"`: the mixtures of transformers' models on `ops.expert_mlp`, with their surprise.

Importing this module registers it. The activation of a model is identified by its values on a few numbers, not by its name, so an unknown
activation raises an error instead of being mistaken for another. This happens when a model is built with this implementation, as by
`from_pretrained`, and in `set_experts_implementation`; `hf._install` adds the check to both.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.surprise_capture import probe_for, register_capturable
from ..ops import expert_mlp
from ..ops._dispatch import autocast_dtype
from ..ops.experts._activations import activate
from ..ops.experts._checks import LIMITS
from ..ops.experts._tuples import Layout
from ..ops.experts.expert_mlp import Activation
from .interfaces import configurations, register_experts, uses_experts_interface

NAME = "tinyonn"

# Attributes that the activation of transformers' experts reads. If one changes, the layout is determined again.
NUMBERS = ("alpha", "limit", "swiglu_alpha", "swiglu_limit")

_layouts: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Layout]] = weakref.WeakKeyDictionary()


def layout_of(module: Any, device: torch.device | str = "cpu") -> Layout:
    """The layout of transformers' experts. Raises InputError if `expert_mlp` does not support them.

    Args:
        module: the experts. Their weights are not read, because a weight that PEFT computes would be kept without its graph.
        device: device on which the activation is evaluated.
    """
    settings = [getattr(module, name, None) for name in ("act_fn", *NUMBERS)]
    known = _layouts.get(module)
    if known is not None and known[0] == settings:
        return known[1]
    if torch.compiler.is_exporting():
        raise InputError(f"{type(module).__name__} must run once before it is exported, so that its activation can be identified.")
    layout = _find_layout(module, torch.device(device))
    _layouts[module] = (settings, layout)
    return layout


@torch.no_grad()
def _find_layout(module: Any, device: torch.device) -> Layout:
    name = type(module).__name__
    if module.has_post_expert_norm:
        raise InputError(f"experts_implementation must not be 'tinyonn' for {name}, which normalises each expert's output.")
    if device.type == "meta":
        raise InputError(f"{name} must be on a device with memory, got meta.")
    limits = [value for number in NUMBERS[1::2] if (value := getattr(module, number, None)) is not None]
    pre = _trial(limits)
    own = (module._apply_gate if module.has_gate else module.act_fn)(pre.float().to(device)).double().cpu()
    for activation, limit in _candidates(limits):
        for interleaved in (False, True) if module.has_gate else (False,):
            layout = Layout(activation, module.has_gate, interleaved, module.is_transposed, limit)
            if torch.allclose(activate(pre, layout), own, rtol=1e-4, atol=1e-5):
                return layout
    raise InputError(
        f"experts_implementation must not be 'tinyonn' for {name}: its activation is none of {', '.join(get_args(Activation))}; "
        "use 'grouped_mm' or 'eager'."
    )


def _trial(limits: list[float]) -> Tensor:
    """(16, 24) numbers: small ones distinguish activations, large ones clamps. They have no symmetry between gate and up."""
    near = torch.linspace(-11.3, 12.9, 96, dtype=torch.float64, device="cpu").roll(5)
    far = torch.logspace(1, 4.5, 192, dtype=torch.float64, device="cpu").view(8, 24).T.flatten()
    far = torch.where(torch.arange(192, device="cpu") % 3 == 0, -far, far)
    # On both sides of the module's own limit.
    around = torch.linspace(-1.9, 2.1, 96, dtype=torch.float64, device="cpu").roll(7) * max((abs(float(x)) for x in limits), default=1.0)
    return torch.cat([near, far, around]).view(16, 24)


def _candidates(limits: list[float]) -> Iterator[tuple[Activation, float]]:
    """Activations without a clamp, and those with one, at the module's own limits and at their default."""
    for activation in get_args(Activation):
        if activation not in LIMITS:
            yield activation, 0.0
        else:
            yield from ((activation, float(limit)) for limit in dict.fromkeys([*limits, LIMITS[activation]]) if limit > 0)


@torch.compiler.assume_constant_result
def _layout_in_graph(module: Any) -> tuple[Layout, str, tuple[Any, ...]]:
    """The layout, with the kind of activation and the numbers for which it holds, which the compiled code checks again."""
    kind = type(getattr(module, "act_fn", None)).__name__
    return layout_of(module), kind, tuple(getattr(module, name, None) for name in NUMBERS)


def _layout_for(module: Any, hidden_states: Tensor) -> Layout:
    if not torch.compiler.is_dynamo_compiling():
        return layout_of(module, hidden_states.device)
    layout, kind, numbers = _layout_in_graph(module)
    # Never true while compiling; the comparisons create guards.
    if kind != type(getattr(module, "act_fn", None)).__name__ or numbers != tuple(getattr(module, name, None) for name in NUMBERS):
        raise InputError(f"the activation of {type(module).__name__} changed while it was compiled.")
    return layout


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts over routed pairs, in transformers' layout.

    Compiles without a graph break; capturing the surprise compiles a mixture once more. An exported model gives no surprise.

    Args:
        module: experts module with (gate_)up_proj, down_proj and optional biases.
        hidden_states: (N, F).
        top_k_index: (N, K); indices outside 0 … E−1 are unused slots.
        top_k_weights: (N, K).

    Returns:
        (N, F), hidden_states' dtype.
    """
    layout = _layout_for(module, hidden_states)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weights = [getattr(module, up), module.down_proj]
    biases = [getattr(module, f"{up}_bias"), module.down_proj_bias] if module.has_bias else [None, None]
    dtype = autocast_dtype(hidden_states) or weights[0].dtype
    gate_up, down = (x.to(dtype) for x in weights)
    gate_up_bias, down_bias = (None if x is None else x.to(dtype) for x in biases)
    probe = probe_for(module, top_k_index, len(weights[0]), dtype)
    out = expert_mlp(
        hidden_states.to(dtype), gate_up, down, top_k_index, top_k_weights, gate_up_bias=gate_up_bias, down_bias=down_bias,
        activation=cast(Activation, layout.activation), gated=layout.gated, interleaved=layout.interleaved, transposed=layout.transposed,
        limit=layout.limit or None, surprise=probe,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


def runs_here(module: nn.Module) -> bool:
    """Whether transformers computes the module's experts by `experts_forward`."""
    return uses_experts_interface(module) and getattr(getattr(module, "config", None), "_experts_implementation", None) == NAME


def check_experts(model: nn.Module) -> None:
    """Raises InputError if a mixture of the model uses this implementation and is not supported by it."""
    for module in model.modules():
        if runs_here(module):
            layout_of(module)


@contextmanager
def experts_checked(model: nn.Module) -> Iterator[None]:
    """Runs `check_experts` after the block. If it fails, restores the implementation of every configuration."""
    before = [(config, config._experts_implementation_internal) for config in configurations(model)]
    yield
    try:
        check_experts(model)
    except InputError:
        for config, implementation in before:
            config._experts_implementation_internal = implementation
        raise


register_experts(NAME, experts_forward)
register_capturable(runs_here)
