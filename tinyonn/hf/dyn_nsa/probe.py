"""Attention layers that can be converted, found by running the model on a few tokens with an attention function that records its calls.

The run has padding, and the mask function records each mask that it makes. The mask of a call then shows whether the layer attends to the
whole past, to a part of it, or by a mask that transformers did not make. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import InputError, reason
from ...ops._attention import MAX_HEAD_DIM
from ..interfaces import attention_implementation, gradients_kept, install_attention, modes_kept
from ..memory import is_out_of_memory
from .attention import is_local, unknown_arguments
from .hooks import not_passed
from .masks import dyn_nsa_mask
from .plain import checked_shape

_PROBE = "dyn_nsa_probe"

MaskKind = Literal["none", "whole", "part", "other"]


def attention_layers(model: PreTrainedModel, chosen: Sequence[int] | None = None, *, with_tau: bool = False) -> dict[str, list[int]]:
    """Name of each layer that attends to the whole past -> query heads, key heads, head size.

    Args:
        chosen: numbers of decoder layers, as their `layer_idx`; None for all that attend to the whole past.
        with_tau: whether each call of the model will pass a tau to its layers.

    Raises:
        InputError: the model is not a causal decoder of token ids; DynNSA cannot replace one of its layers, or has none to replace; a
            chosen layer is none of these; no layer gets the tau. TypeError: `chosen` is not a list of integers.
    """
    kind = type(model).__name__
    if chosen is not None:
        _check_numbers(chosen)
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise InputError(f"model must be a decoder whose only input is token ids, got {kind}.")
    names = {module: name for name, module in model.named_modules()}
    plain = _calls(model, padded=False, **({"tau": 1.0} if with_tau else {}))
    if not plain:
        raise InputError(f"{kind} has no attention layer that uses transformers' AttentionInterface.")
    if with_tau and not any(call.has_tau for call in plain):
        raise InputError(not_passed("tau_source", model))
    for call in plain:
        _check(call, chosen)
    with modes_kept(model):
        for call in plain:
            call.module.training = True  # so that it passes its dropout; its children stay in eval mode
        padded = _calls(model, padded=True)
    layers: dict[str, list[int]] = {}
    for call in padded:
        _check(call, chosen)
        if call.local or not call.is_among(chosen):
            continue
        sizes = [call.query[1], call.key[1], call.query[3]]
        if layers.setdefault(names[call.module], sizes) != sizes:
            raise InputError(f"{call.name} was called with different numbers of heads: {layers[names[call.module]]} and {sizes}.")
    full = {call.number for call in padded if not call.local}
    if not full:
        raise InputError(f"{kind} has no full attention layer to convert; all {len(plain)} have sliding windows or chunks.")
    if chosen is not None and (others := sorted(set(chosen) - full)):
        there = ", ".join(str(number) for number in sorted(number for number in full if number is not None)) or "not numbered"
        raise InputError(f"layers must be numbers of full attention layers of {kind}, which are {there}, got {others[0]}.")
    return layers


def _check_numbers(chosen: Any) -> None:
    numbers = chosen if isinstance(chosen, Sequence) and not isinstance(chosen, (str, bytes)) else None
    if numbers is None or any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise TypeError(f"layers must be a list of numbers of layers, got {chosen!r}.")
    if not numbers:
        raise InputError("layers must name at least one layer, got none; leave it out to convert every full attention layer.")


class _Call(NamedTuple):
    """Arguments of one call of an attention function."""

    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: MaskKind
    dropout: float
    is_causal: bool
    sliding: bool  # whether it passed sliding_window
    unknown: list[str]  # arguments that DynNSA does not support
    softcap: Any
    sinks: Any
    has_tau: bool

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @property
    def local(self) -> bool:
        return self.sliding or self.mask == "part"

    @property
    def number(self) -> int | None:
        return getattr(self.module, "layer_idx", None)

    def is_among(self, chosen: Sequence[int] | None) -> bool:
        return chosen is None or self.number in chosen


def _check(call: _Call, chosen: Sequence[int] | None) -> None:
    """InputError unless DynNSA can replace this call, or leave it as it is if the layer is local or not chosen."""
    if call.unknown:
        raise InputError(f"{call.name} passes {', '.join(call.unknown)} to its attention, and DynNSA does not support it.")
    checked_shape(call.name, call.query[1], call.softcap, call.sinks)
    if call.local:
        if not is_local(call.module, 1 if call.sliding else None):
            raise InputError(f"{call.name} attends to a part of the past only, but neither sliding_window nor layer_types says so.")
        return
    if not call.is_causal:
        raise InputError(f"{call.name} cannot be converted: its attention is not causal.")
    if call.mask == "other":
        raise InputError(f"{call.name} cannot be converted: it does not use transformers' causal mask.")
    if not call.is_among(chosen):
        return
    if call.dropout:
        raise InputError(f"attention dropout must be 0, got {call.dropout} in {call.name}; set it to 0 in the configuration.")
    if call.value != call.key or call.query[3] > MAX_HEAD_DIM:
        raise InputError(
            f"{call.name} cannot be converted: heads of keys and values must have the same size, at most {MAX_HEAD_DIM}, got "
            f"{call.key[3]} and {call.value[3]}."
        )


class _Notes:
    """Masks made in the current run, by address of their memory, and calls of the attention function."""

    def __init__(self) -> None:
        self.masks: dict[int, tuple[Tensor, MaskKind]] = {}
        self.calls: list[_Call] = []


_notes: list[_Notes] = []


def _calls(model: PreTrainedModel, *, padded: bool, **keywords: Any) -> list[_Call]:
    """The model's calls of its attention function, in order.

    Args:
        keywords: further arguments of the model.

    Raises:
        InputError: the model does not run with a registered attention function.
    """
    shape = (2, 3) if padded else (1, 2)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.long, device=model.device), "use_cache": False}
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, 0] = 0
    notes = _Notes()
    _notes.append(notes)
    try:
        with torch.no_grad(), gradients_kept(model), attention_implementation(model, _PROBE):
            model(**inputs, **keywords)
    except Exception as error:  # a model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{type(model).__name__} does not run with an attention function and masks of AttentionInterface: {type(error).__name__}: "
            f"{reason(error)}"
        ) from error
    finally:
        _notes.pop()
    return notes.calls


def _probe_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of DynNSA's mask function, recorded with its kind."""
    local = local_size is not None
    if local:
        # Not skipped, although the few tokens here do not need a mask; longer texts do.
        mask = sdpa_mask(*args, **{**kwargs, "local_size": local_size, "allow_is_causal_skip": False})
    else:
        mask = dyn_nsa_mask(*args, **kwargs)
    if mask is not None:
        kind: MaskKind = "part" if local else "whole" if mask.dtype == torch.int32 else "other"
        _notes[-1].masks[mask.untyped_storage().data_ptr()] = (mask, kind)
    return mask


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    dropout, scaling, is_causal, window = (given.pop(name, None) for name in ("dropout", "scaling", "is_causal", "sliding_window"))
    mask: MaskKind = "none"
    if attention_mask is not None:
        made = _notes[-1].masks.get(attention_mask.untyped_storage().data_ptr())
        mask = "other" if made is None or made[0].dtype != attention_mask.dtype else made[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softcap, sinks, tau = (given.pop(name, None) for name in ("softcap", "s_aux", "tau"))
    unknown = unknown_arguments(given)
    sizes = (query.shape, key.shape, value.shape)
    _notes[-1].calls.append(
        _Call(module, *sizes, mask, dropout or 0.0, causal, window is not None, unknown, softcap, sinks, tau is not None)
    )
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=is_causal)


install_attention(_PROBE, _probe, mask=_probe_mask)
