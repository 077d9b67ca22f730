"""Attention and experts functions registered with transformers, and switched on for one model at a time.

A registered function is available to every model of the process. It runs only in a model whose configuration names it.
`attention_implementation` and `experts_implementation` set the name on every configuration of a model and restore the old
names afterwards, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.moe import ExpertsInterface

from ..errors import InputError

_REGISTERED: set[str] = set()  # names given to `register_attention`


def register_attention(name: str, forward: Callable[..., Any], *, mask: str | Callable[..., Any] = "sdpa") -> None:
    """Makes `forward` available as `attn_implementation=name`.

    The mask function is registered under the same name. Without one, transformers passes no mask, and tokens attend to padding.

    Args:
        name: name of the implementation in a configuration. A name that transformers or tinyonn uses cannot be given; a name that this
            function registered before can, and the new functions replace the old ones.
        forward: `(module, query, key, value, attention_mask, dropout, scaling, **kwargs) -> (out, weights | None)`; query
            (B, H, T, D), key and value (B, K, T, D), out (B, T, H, D).
        mask: the registered implementation whose masks `forward` takes: "sdpa" (bool, or None for plain causal) or
            "eager" (additive float); or a mask function with the same arguments.

    Raises:
        TypeError: `name` is not a string, or `forward` or `mask` not a function.
        ValueError: `name` is empty or in use; no mask function is registered as `mask`.
    """
    masks = AttentionMaskInterface()
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}.")
    if not name.strip():
        raise ValueError(f"name must not be empty, got {name!r}.")
    if not callable(forward):
        raise TypeError(f"forward must be a function, got {type(forward).__name__}.")
    if not isinstance(mask, str) and not callable(mask):
        raise TypeError(f"mask must be a function or the name of a registered one, got {type(mask).__name__}.")
    if isinstance(mask, str) and mask not in masks:
        raise ValueError(f"mask must be one of {', '.join(masks)}, got {mask!r}.")
    if name not in _REGISTERED and (name == "eager" or name in AttentionInterface() or name in masks):
        raise ValueError(f"name must not be that of another implementation, got {name!r}.")
    install_attention(name, forward, mask=mask)
    _REGISTERED.add(name)


def install_attention(name: str, forward: Callable[..., Any], *, mask: str | Callable[..., Any] = "sdpa") -> None:
    """`register_attention` without its checks, for tinyonn's own names, which it then protects."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[mask] if isinstance(mask, str) else mask)


def register_experts(name: str, forward: Callable[..., Any]) -> None:
    """Makes `forward` available as `experts_implementation=name`.

    Args:
        name: name of the implementation in a configuration.
        forward: `(experts_module, hidden_states (N, F), top_k_index (N, k), top_k_weights (N, k)) -> (N, F)`.
    """
    ExpertsInterface.register(name, forward)


def configurations(model: nn.Module) -> list[PretrainedConfig]:
    """Every distinct configuration object of the model's modules, nested ones included."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                add(getattr(config, key, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether a module's experts are computed by the function that its configuration names."""
    marks = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    return all(hasattr(module, mark) for mark in marks) and isinstance(getattr(module, "down_proj", None), nn.Parameter)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the training mode of every module after the block, also if the modes differ."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Runs forwards of a quantised model with gradients enabled within the block; other models are unaffected.

    On a CPU, bitsandbytes repacks 4-bit weights in a forward without gradients. Gradients through the model are wrong afterwards.
    """
    quantised = any(getattr(module, "is_quantized", False) for module in model.modules())
    embedding = model.get_input_embeddings() if quantised else None  # type: ignore[operator]
    if embedding is None:
        yield
        return

    def require_gradients(module: nn.Module, args: Any, output: Any) -> Any:
        return output if output.requires_grad else output.detach().requires_grad_()

    handle = embedding.register_forward_hook(require_gradients)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        handle.remove()


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block, the model's attention is the function registered as `name`.

    Modules that do not use AttentionInterface keep their own attention; this cannot be detected here.

    Raises:
        InputError: `name` is not registered.
    """
    with _set_on_every_config(model, "_attn_implementation_internal", name, "attention", AttentionInterface()):
        yield


@contextmanager
def experts_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block, the model's experts are computed by the function registered as `name`.

    Raises:
        InputError: `name` is not registered.
    """
    with _set_on_every_config(model, "_experts_implementation_internal", name, "experts", ExpertsInterface()):
        yield


@contextmanager
def _set_on_every_config(model: nn.Module, attribute: str, name: str, kind: str, registered: Container[str]) -> Iterator[None]:
    if name != "eager" and name not in registered:
        raise InputError(f"{kind} implementation must be a registered name, got {name!r}.")
    # The public property also sets nested configurations, so restoring by it would lose their own values.
    before = [(config, getattr(config, attribute)) for config in configurations(model)]
    try:
        for config, _ in before:
            setattr(config, attribute, name)
        yield
    finally:
        for config, value in before:
            setattr(config, attribute, value)
