"""Conversion of a trained model to DynNSA."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.dyn_nsa import TauSource
from .._converted import checked_model, forget, record, recorded
from .hooks import add_parts, remove_observed_forward
from .options import checked_options
from .parts import DYN_NSA, PART, cores
from .probe import attention_layers


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
    found by running the model on a few tokens; layers with a sliding window or chunks, which are local already, are left as they are.

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
            DynNSA lacks (softcap, sinks, dropout, masks of a layer's own, values of another size than keys, as in MLA).
        TypeError, ValueError: no model of transformers; a bad option.
    """
    checked_model(model)
    if next(cores(model), None) is not None:
        raise InputError("model must not have been converted before.")
    options = checked_options({
        "compress_size": compress_size, "block_size": block_size, "window": window, "temperature": temperature, "max_blocks": max_blocks,
        "detach_scores": detach_scores, "learnable_compression": learnable_compression, "start_gates": (0.0, 1.0, 0.0), "base": base,
        "slope": slope, "tau_source": tau_source, "tau": tau, "impl": impl,
    })  # fmt: skip
    layers = attention_layers(model)
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
        mixtures = "; MLPs have no way back: load the unconverted model" if "dyn_moe" in recorded(model.config) else ""
        raise InputError(f"model must have been converted by convert_attention before{mixtures}.")
    if not remove_observed_forward(model):
        raise InputError("model.forward must be as convert_attention left it, got one that was replaced since: unwrap the model first.")
    for name in names:
        module: Any = model.get_submodule(name)
        delattr(module, PART)
        getattr(module, "config", model.config)._attn_implementation_internal = attn_implementation
    forget(model, DYN_NSA)
    return model
