"""Conversion of a trained model to DynNSA."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.dyn_nsa_options import Importance, TauSource
from .._converted import checked_model, forget, record, recorded
from .hooks import add_parts, remove_observed_forward
from .options import checked_options
from .parts import DYN_NSA, PART, cores
from .probe import attention_layers


def convert_attention(
    model: PreTrainedModel,
    *,
    layers: Sequence[int] | None = None,
    compress_size: int = 16,
    block_size: int = 64,
    window: int = 512,
    temperature: float = 0.05,
    max_blocks: int | None = None,
    forced_first: int = 1,
    forced_local: int = 2,
    importance: Importance = "share",
    base: float = 0.0,
    slope: float = 0.0,
    detach_scores: bool = False,
    learnable_compression: bool = True,
    compress_query: bool = True,
    tau_source: TauSource = "attention",
    tau: float = 0.5,
    impl: str = "auto",
) -> PreTrainedModel:
    """Adds the learnable parts of DynNSA to each attention layer of a model, in place; its outputs stay the same.

    The branch gates, linear functions of the query, start at (0, 1, 0). All blocks are selected at first: `price`, a number that is added
    to each threshold, is -30, or less if the options need it. `calibrate` sets it for a budget; `BudgetSchedule` moves it during training.
    Compression starts as the mean. By default the gates of blocks are hard, which suits a model whose weights stay as they are;
    `BudgetSchedule` widens them while the model trains. Attention layers are found by running the model on a few tokens. Layers with a
    sliding window or chunks are local already and stay as they are, and so do full ones that `layers` does not name. Softcaps and sinks of
    a model apply in every branch.

    The model saves with `save_pretrained`, and loads with `from_pretrained` once `tinyonn.hf` is imported. The model gets its own copy of
    its configuration, which records the conversion. The model may be quantised, and `convert_mlp_to_dynmoe` can convert its MLPs too.
    Gradient checkpointing must be non-reentrant, which is transformers' default. The budget loss and the distillation
    loss are added to the loss that the model returns for `labels`; for a loss of your own, add `collected_budget_loss(model)`.

    By default, block lists have an entry of 8 bytes for each of the Tk / block_size blocks, per query and key/value head, and backward
    keeps them. Once the budget is lower, give `BudgetSchedule` a `max_blocks`. A `max_blocks` given here applies from the start; outputs
    then stay the same for texts of up to max_blocks · block_size tokens.

    Args:
        model: causal decoder that uses transformers' AttentionInterface.
        layers: numbers of the decoder layers to convert, from 0; None for all without a sliding window or chunks.
        compress_size … impl: see `DynNSAOptions`. The defaults are those of the class, except temperature=0.05 (1.0 there), which reads the
            blocks that pass almost in full, and max_blocks=None (32 there), which keeps the outputs. `ops.dyn_nsa` has compress_size=64.

    Returns:
        The model.

    Raises:
        InputError: the model is converted already, has weights on the meta device, is not a causal decoder, or has no layer to convert;
            its attention is not supported (dropout, own masks, heads above 256, or values of another size than keys, as in MLA); `layers`
            names a layer that is not a full attention layer; tau_source is "output" in a model that passes no keywords to its attention.
        TypeError, ValueError: `model` is not a transformers model; `layers` is not a list of integers; an option is invalid.
    """
    checked_model(model)
    if next(cores(model), None) is not None:
        raise InputError("model was converted before; a model can be converted once.")
    options = checked_options({
        "compress_size": compress_size, "block_size": block_size, "window": window, "temperature": temperature, "max_blocks": max_blocks,
        "forced_first": forced_first, "forced_local": forced_local, "importance": importance, "detach_scores": detach_scores,
        "learnable_compression": learnable_compression, "compress_query": compress_query, "start_gates": (0.0, 1.0, 0.0), "base": base,
        "slope": slope, "tau_source": tau_source, "tau": tau, "impl": impl,
    })  # fmt: skip
    found = attention_layers(model, layers, with_tau=tau_source == "output")
    add_parts(model, dataclasses.asdict(options), found)
    record(model, DYN_NSA, dataclasses.asdict(options), found)
    for name in found:
        config: Any = getattr(model.get_submodule(name), "config", model.config)
        config._attn_implementation_internal = DYN_NSA  # the public setter would reach a vision tower's too
    return model


def revert_attention(model: PreTrainedModel, attn_implementation: str | None = None) -> PreTrainedModel:
    """Removes the parts that `convert_attention` added to a model, in place, with all that they learned.

    The model's own weights stay as they are, fine-tuned or not. The model then saves as an ordinary model.

    Args:
        model: a converted model.
        attn_implementation: attention implementation that its layers use afterwards; None for "sdpa", or "eager" in models that SDPA
            does not support, as those with softcaps or sinks.

    Returns:
        The model.

    Raises:
        InputError: the model is not converted, or a wrapper has replaced its `forward` since.
        ValueError, ImportError: transformers does not know the implementation, or lacks a package that it needs.
    """
    names = {name for name, module in model.named_modules() if PART in module._modules}
    if not names:
        mixtures = "; the conversion of MLPs cannot be undone: load the unconverted model" if "dyn_moe" in recorded(model.config) else ""
        raise InputError(f"model must have been converted by convert_attention before{mixtures}.")
    if attn_implementation is None:
        attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    model.get_correct_attn_implementation(attn_implementation)  # an error before anything is removed
    if not remove_observed_forward(model):
        raise InputError("model.forward was replaced after convert_attention; unwrap the model first.")
    for name in names:
        module: Any = model.get_submodule(name)
        delattr(module, PART)
        getattr(module, "config", model.config)._attn_implementation_internal = attn_implementation
    forget(model, DYN_NSA)
    return model
