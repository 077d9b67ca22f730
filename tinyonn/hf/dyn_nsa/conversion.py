"""Conversion of a trained model to DynNSA."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import InputError
from ...nn.dyn_nsa import TauSource
from ..interfaces import attention_implementation, register_attention
from ..record import forget, record
from .attention import unknown_arguments
from .hooks import add_parts, remove_observed_forward
from .options import checked_options
from .parts import DYN_NSA, PART, cores

_PROBE = "dyn_nsa_probe"
MAX_HEAD_DIM = 256


def convert_attention(
    model: PreTrainedModel,
    *,
    compress_size: int = 64,
    block_size: int = 64,
    window: int = 512,
    temperature: float = 1.0,
    max_blocks: int | None = None,
    base: float = 0.0,
    slope: float = 1.0,
    detach_scores: bool = False,
    learnable_compression: bool = True,
    tau_source: TauSource = "attention",
    tau: float = 0.5,
    impl: str = "auto",
) -> PreTrainedModel:
    """Adds the learnable parts of DynNSA to each attention layer of a model, in place; its outputs stay the same.

    It starts with branch gates (0, 1, 0), a linear function of the query with a gradient there, and with all blocks selected: `opening`
    is -30, or less where the options need it. `BudgetSchedule` lowers the budget. Compression starts as the mean. Attention layers are
    found by running the model on two tokens; layers with a sliding window are left as they are.

    The model saves with `save_pretrained`, and loads with `from_pretrained` once `tinyonn.hf` is imported; its configuration, a copy that
    it takes for itself, records the conversion. It may be quantised, and have its MLPs converted by `convert_mlp_to_dynmoe`. Gradient
    checkpointing must be the non-reentrant kind, which is transformers' own choice. The budget loss is added to the loss that the model
    returns for `labels`; for a loss of your own, add `collected_budget_loss(model)`.

    Lists of blocks have room for all there are, Tk / block_size a query and key/value head, 8 bytes an entry, which backward keeps: give
    `BudgetSchedule` a `max_blocks` once the budget is lower. A `max_blocks` given here holds from the start, and outputs stay the same
    for texts of up to max_blocks · block_size tokens.

    Args:
        model: a causal decoder that asks AttentionInterface.
        compress_size … impl: see `DynNSAOptions`.

    Returns:
        The model.

    Raises:
        InputError: already converted, or without weights (on the meta device); no causal decoder; no layer to convert; attention that
            DynNSA lacks (softcap, sinks, dropout, values of another size than keys).
        TypeError, ValueError: no model of transformers; a bad option.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = "; convert the one that it wraps" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}{wrapped}.")
    if next(cores(model), None) is not None:
        raise InputError("model must not have been converted before.")
    options = checked_options({
        "compress_size": compress_size, "block_size": block_size, "window": window, "temperature": temperature, "max_blocks": max_blocks,
        "detach_scores": detach_scores, "learnable_compression": learnable_compression, "start_gates": (0.0, 1.0, 0.0), "base": base,
        "slope": slope, "tau_source": tau_source, "tau": tau, "impl": impl,
    })  # fmt: skip
    layers = _attention_layers(model)
    add_parts(model, dataclasses.asdict(options), layers)
    record(model, DYN_NSA, dataclasses.asdict(options), layers)
    for name in layers:
        config: Any = getattr(model.get_submodule(name), "config", model.config)
        config._attn_implementation_internal = DYN_NSA  # the public setter would reach a vision tower's too
    return model


def revert_attention(model: PreTrainedModel, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Takes the parts of `convert_attention` out of a model again, in place, and what they have learnt with them.

    The model's own weights stay as they are, fine-tuned or not; what it saves then needs no tinyonn.

    Args:
        model: a converted model.
        attn_implementation: what its attention layers run from now on.

    Returns:
        The model.

    Raises:
        InputError: not converted; a wrapper has replaced `forward` since.
    """
    names = {name for name, module in model.named_modules() if PART in module._modules}
    if not names:
        raise InputError("model must have been converted before.")
    if not remove_observed_forward(model):
        raise InputError("model.forward must be as convert_attention left it, got one that was replaced since: unwrap the model first.")
    for name in names:
        module: Any = model.get_submodule(name)
        delattr(module, PART)
        getattr(module, "config", model.config)._attn_implementation_internal = attn_implementation
    forget(model, DYN_NSA)
    return model


def _attention_layers(model: PreTrainedModel) -> dict[str, list[int]]:
    """Name of each full attention layer and its query heads, key heads and head size."""
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise InputError(f"model must be a decoder of token ids alone, got {type(model).__name__}.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("model must have its weights to be converted, got some on the meta device; load them first.")
    names = {module: name for name, module in model.named_modules()}
    modules = [call.module for call in _probe_calls(model)]
    training = [module.training for module in modules]
    try:
        for module in modules:  # its children stay as they are: this alone makes a layer tell its dropout
            module.training = True
        found = _probe_calls(model)
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was
    layers = {}
    for module, query, key, value, dropout, given in found:
        if given.pop("sliding_window", None) is not None:
            continue
        name = type(module).__name__
        if unknown := unknown_arguments(given):
            raise InputError(f"model must not pass {', '.join(unknown)} to its attention, which DynNSA lacks; {name} does.")
        if not getattr(module, "is_causal", True):
            raise InputError(f"attention must be causal to convert, got {name}.")
        if dropout:
            raise InputError(f"attention dropout must be 0 to convert, got {dropout} in {name}: set it to 0 in the configuration.")
        if value != key or query[3] > MAX_HEAD_DIM:
            raise InputError(f"{name} must have keys and values of one size, at most {MAX_HEAD_DIM}, got {key[3]} and {value[3]}.")
        layers[names[module]] = [query[1], key[1], query[3]]
    if not layers:
        raise InputError(
            f"{type(model).__name__} must have attention layers that ask AttentionInterface and have no sliding window, got "
            f"{len(found)} with one."
        )
    return layers


class _Call(NamedTuple):
    """What one layer handed to its attention function."""

    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dropout: float
    given: dict[str, Any]


_probed: list[_Call] = []


def _probe_calls(model: PreTrainedModel) -> list[_Call]:
    """Runs the model on two tokens; its calls of the attention function, in order."""
    with torch.no_grad(), attention_implementation(model, _PROBE):
        _probed.clear()
        try:
            model(torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
            return list(_probed)
        finally:
            _probed.clear()


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    _probed.append(_Call(module, query.shape, key.shape, value.shape, dropout, kwargs))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)


register_attention(_PROBE, _probe, mask="sdpa")
