"""Conversion of a trained model to DynNSA."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import InputError
from ...nn.dyn_nsa import DynNSAOptions, TauSource
from ..interfaces import attention_implementation, register_attention
from .attention import unknown_arguments
from .hooks import add_parts
from .parts import DYN_NSA, cores
from .saving import DynNSAConversion

_PROBE = "dyn_nsa_probe"
MAX_HEAD_DIM = 256


def convert_attention(
    model: PreTrainedModel,
    *,
    compress_size: int = 64,
    block_size: int = 64,
    window: int = 512,
    temperature: float = 1.0,
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
    is -30. `BudgetSchedule` lowers the budget. Compression starts as the mean. Attention layers are found by running the model on two
    tokens; layers with a sliding window are left as they are.

    The model saves with `save_pretrained`, and loads with `from_pretrained` once this module is imported. Its gradient checkpointing
    must be the non-reentrant kind, which is transformers' own choice. The budget loss is added to the loss that the model returns for
    `labels`; for a loss of your own, add `collected_budget_loss(model)`.

    Args:
        model: a causal decoder that asks AttentionInterface.
        compress_size … impl: see `DynNSAOptions`.

    Returns:
        The model.

    Raises:
        InputError: already converted, or quantised; no layer to convert; attention that DynNSA lacks (softcap, sinks, dropout, values of
            another size than keys).
    """
    if next(cores(model), None) is not None:
        raise InputError("model must not have been converted before.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("model must not be quantised: its configuration has one quantization_config, which conversion needs.")
    options = DynNSAOptions(
        compress_size=compress_size, block_size=block_size, window=window, temperature=temperature, max_blocks=None,
        detach_scores=detach_scores, learnable_compression=learnable_compression, start_gates=(0.0, 1.0, 0.0), base=base, slope=slope,
        tau_source=tau_source, tau=tau, impl=impl,
    )  # fmt: skip
    layers = _attention_layers(model)
    conversion = DynNSAConversion(dataclasses.asdict(options), layers)
    add_parts(model, conversion.options, layers)
    model.config.quantization_config = conversion
    model.set_attn_implementation(DYN_NSA)
    return model


def _attention_layers(model: PreTrainedModel) -> dict[str, list[int]]:
    """Name of each full attention layer and its query heads, key heads and head size."""
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad(), attention_implementation(model, _PROBE):
        _probed.clear()
        try:
            model(torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
            found = list(_probed)
        finally:
            _probed.clear()
    layers = {}
    for module, query, key, value, given in found:
        if given.pop("sliding_window", None) is not None:
            continue
        name = type(module).__name__
        if unknown := unknown_arguments(given):
            raise InputError(f"model must not pass {', '.join(unknown)} to its attention, which DynNSA lacks; {name} does.")
        if getattr(module, "attention_dropout", 0):
            raise InputError(f"attention dropout must be 0 to convert, got {module.attention_dropout} in {name}.")
        if not getattr(module, "is_causal", True):
            raise InputError(f"attention must be causal to convert, got {name}.")
        if value != key or query[3] > MAX_HEAD_DIM:
            raise InputError(f"{name} must have keys and values of one size, at most {MAX_HEAD_DIM}, got {key[3]} and {value[3]}.")
        layers[names[module]] = [query[1], key[1], query[3]]
    if not layers:
        raise InputError(
            f"{type(model).__name__} must have attention layers that ask AttentionInterface and have no sliding window, got "
            f"{len(found)} with one."
        )
    return layers


_probed: list[tuple[nn.Module, torch.Size, torch.Size, torch.Size, dict[str, Any]]] = []


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
    _probed.append((module, query.shape, key.shape, value.shape, kwargs))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)


register_attention(_PROBE, _probe, mask="sdpa")
