"""Construction of the parts of a converted model from the record in its configuration; see `hf._converted`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore
from .._converted import RECORD, Conversion, own_layers, register_conversion
from .hooks import add_parts
from .options import with_rule
from .parts import DYN_NSA, PART


def choose_attention(config: PretrainedConfig) -> None:
    """Sets DynNSA as the attention implementation unless the caller chose one."""
    text: Any = config.get_text_config(decoder=True)
    if text._attn_implementation is None:
        text._attn_implementation_internal = DYN_NSA  # the public setter would reach a vision tower's too


def build(model: PreTrainedModel, conversion: dict[str, Any]) -> None:
    """Adds the recorded parts to a model.

    Raises:
        InputError: a layer does not exist, or its sizes are not three numbers; an invalid option. TypeError, ValueError: an invalid option.
    """
    conversion["layers"] = layers = own_layers(model, conversion["layers"], "attention layers")
    for name, sizes in layers.items():
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise InputError(f"config.{RECORD} must give query heads, key heads and head size of {name}, got {sizes}.")
    conversion["options"] = with_rule(conversion["options"], f"config.{RECORD}.{DYN_NSA}")
    add_parts(model, conversion["options"], layers)


register_conversion(DYN_NSA, Conversion(choose_attention, build, DynNSACore, mark=f".{PART}.base"))
