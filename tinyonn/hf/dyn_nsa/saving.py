"""Loading of converted models.

It uses the hook by which transformers changes a model between building it and reading its weights, the one of quantisation: a converted
model's config.json carries `quantization_config = {"quant_method": "dyn_nsa", ...}`, so `from_pretrained` adds the same parts again, and
without tinyonn imported it warns of the unknown method. Nothing is quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .hooks import add_parts, own_layers
from .parts import DYN_NSA, cores


@register_quantization_config(DYN_NSA)
class DynNSAConversion(QuantizationConfigMixin):
    """What a converted model's configuration says of its conversion; a `quantization_config` in name only.

    Args:
        options: fields of `DynNSAOptions`.
        layers: name of each converted attention layer -> query heads, key heads, head size.
    """

    def __init__(self, options: dict[str, Any], layers: dict[str, list[int]], **kwargs: Any) -> None:
        self.quant_method = DYN_NSA  # type: ignore[assignment]
        self.options = options
        self.layers = layers


@register_quantizer(DYN_NSA)
class DynNSALoader(HfQuantizer):
    """Adds the parts between building a model and reading its weights; leaves no mark of a quantised model behind."""

    quantization_config: DynNSAConversion
    requires_calibration = True  # loads converted models only; convert_attention converts

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        if config._attn_implementation is None:
            # Of the text model alone: the public setter would reach a vision tower's too.
            config.get_text_config(decoder=True)._attn_implementation_internal = DYN_NSA
        return config

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        conversion = self.quantization_config
        conversion.layers = own_layers(model, conversion.layers)
        add_parts(model, conversion.options, conversion.layers)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer
        model.config.quantization_config = self.quantization_config
        for core in cores(model):
            core.reset_statistics()  # not saved, and no memory of theirs was ever set

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
