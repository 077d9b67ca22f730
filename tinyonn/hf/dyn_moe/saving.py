"""Loading of converted models.

As for `dyn_nsa`, a converted model's config.json carries its conversion where transformers keeps that of quantisation,
`quantization_config = {"quant_method": "dyn_moe", ...}`: `from_pretrained` puts the same mixtures in place of the MLPs before it reads
weights, and without tinyonn imported it warns of the unknown method. Nothing is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import InputError
from ...nn import DynMoE
from .budget import take_surprise_budget
from .options import DynMoEOptions, LayerSizes, build, of_mapping

DYN_MOE = "dyn_moe"


@register_quantization_config(DYN_MOE)
class DynMoEConversion(QuantizationConfigMixin):
    """What a converted model's configuration says of its conversion; a `quantization_config` in name only.

    Args:
        options: fields of `DynMoEOptions`.
        layers: name of each converted MLP -> fields of `LayerSizes`.
    """

    def __init__(self, options: dict[str, Any], layers: dict[str, dict[str, Any]], **kwargs: Any) -> None:
        self.quant_method = DYN_MOE  # type: ignore[assignment]
        self.options = options
        self.layers = layers


@register_quantizer(DYN_MOE)
class DynMoELoader(HfQuantizer):
    """Puts mixtures in place of MLPs between building a model and reading its weights; leaves no mark of a quantised model behind."""

    quantization_config: DynMoEConversion
    requires_calibration = True  # loads converted models only; convert_mlp_to_dynmoe converts

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        conversion = self.quantization_config
        conversion.layers = own_layers(model, conversion.layers)
        options = of_mapping(DynMoEOptions, conversion.options, "quantization_config.options")
        for name, given in conversion.layers.items():
            sizes = of_mapping(LayerSizes, given, f"quantization_config.layers of {name}")
            weight = next(model.get_submodule(name).parameters())
            model.set_submodule(name, build(options, sizes, device=weight.device, dtype=weight.dtype))
        take_surprise_budget(model)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer
        model.config.quantization_config = self.quantization_config
        for module in model.modules():
            if isinstance(module, DynMoE):
                module.reset_statistics()  # not saved, and no memory of theirs was ever set

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def own_layers(model: PreTrainedModel, layers: Any) -> dict[str, dict[str, Any]]:
    """Layers of a conversion by their names in this model: a model with a head and its base model name them differently.

    Raises:
        InputError: a layer is not there.
    """
    if not isinstance(layers, Mapping):
        raise InputError(f"quantization_config.layers must be a dict by layer name, got {type(layers).__name__}.")
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, sizes in layers.items():
        own = next((own for own in (name, prefix + name, name.removeprefix(prefix)) if own in names), None)
        if own is None:
            raise InputError(f"quantization_config must name MLPs of {type(model).__name__}, got {name!r}.")
        found[own] = sizes
    return found
