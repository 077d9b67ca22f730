"""Construction of the mixtures of a converted model from the record in its configuration; see `hf._converted`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...nn import DynMoE
from .._converted import RECORD, Conversion, own_layers, register_conversion
from ..guard import replace_module
from .budget import take_surprise_budget
from .options import DynMoEOptions, LayerSizes, build, of_mapping

DYN_MOE = "dyn_moe"


def build_mixtures(model: PreTrainedModel, conversion: dict[str, Any]) -> None:
    """Replaces the recorded MLPs by mixtures.

    Raises:
        InputError: a layer does not exist; options or sizes are missing or unknown. TypeError, ValueError: an invalid option.
    """
    conversion["layers"] = layers = own_layers(model, conversion["layers"], "MLPs")
    options = of_mapping(DynMoEOptions, conversion["options"], f"config.{RECORD}.{DYN_MOE}.options")
    for name, given in layers.items():
        sizes = of_mapping(LayerSizes, given, f"config.{RECORD}.{DYN_MOE}.layers of {name}")
        mlp = model.get_submodule(name)
        if not isinstance(mlp, DynMoE):  # the base model has built it
            weight = next(mlp.parameters())
            replace_module(model, name, build(options, sizes, device=weight.device, dtype=weight.dtype))
    take_surprise_budget(model)


# Mixtures need no preparation of the configuration.
register_conversion(DYN_MOE, Conversion(lambda config: None, build_mixtures, DynMoE, mark=".router.prototypes"))
