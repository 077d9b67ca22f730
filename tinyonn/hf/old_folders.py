"""Folders of earlier versions, which recorded a conversion in the field for quantisation.

Their config.json has `quantization_config = {"quant_method": "dyn_nsa", "options": {...}, "layers": {...}}`, or "dyn_moe". It is moved to
the record of `hf._converted` before the model is built, so the model saves in the new format. The registered loader does nothing; without
one, transformers raises an error for an unknown method.

Weights that were renamed since are read by their old names; `register_renamings` tells transformers, whose names for saving stay the new.
Buffers that a part got since, which its class names in `ADDED`, get the value that means what was computed without them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHODS = ("dyn_nsa", "dyn_moe")
_RENAMED = {r"\.dyn_nsa\.opening$": ".dyn_nsa.price"}  # pattern of the old name -> end of the new


class OldConversion(QuantizationConfigMixin):
    """`quantization_config` of an old folder."""

    def __init__(self, options: Any = None, layers: Any = None, *, quant_method: str, **kwargs: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.options, self.layers = options, layers


class OldLoader(HfQuantizer):
    requires_calibration = True  # it only loads converted models

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Nothing to do: `hf._install` has built the parts."""

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


for method in METHODS:
    register_quantization_config(method)(type(f"Old_{method}", (OldConversion,), {}))
    register_quantizer(method)(type(f"OldLoader_{method}", (OldLoader,), {}))


def register_renamings() -> None:
    """Adds the old names to transformers' own old names, which it reads for every model."""
    added = [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in _RENAMED.items()]
    register_checkpoint_conversion_mapping("legacy", [*get_checkpoint_conversion_mapping("legacy"), *added], overwrite=True)


def forget_renamings(model: PreTrainedModel) -> None:
    """Lets a model that was read by old names be saved by the new: transformers would write the names that it read."""
    used: Any = getattr(model, "_weight_conversions", None)
    if used:
        old = set(_RENAMED)
        vars(model)["_weight_conversions"] = [one for one in used if not old & set(getattr(one, "source_patterns", []))]


def fill_added(part: Any) -> None:
    """Gives a part the buffers that a folder lacks because its version did not have them yet."""
    for name, value in getattr(part, "ADDED", {}).items():
        buffer = getattr(part, name)
        if not buffer.is_meta and not getattr(buffer, "_is_hf_initialized", False):
            buffer.fill_(value)
            buffer._is_hf_initialized = True


def without_added(missing: set[str], parts: dict[str, Any]) -> set[str]:
    """Names of missing weights without those that `fill_added` has filled.

    Args:
        parts: by name.
    """
    return missing - {f"{name}.{buffer}" for name, part in parts.items() for buffer in getattr(part, "ADDED", {})}


def moved(config: PretrainedConfig) -> tuple[str, dict[str, Any]] | None:
    """Removes an old conversion from a configuration and returns its kind, options and layers; None if there is none."""
    found: Any = getattr(config, "quantization_config", None)
    given = found if isinstance(found, dict) else vars(found) if isinstance(found, OldConversion) else {}
    method = given.get("quant_method")
    if method not in METHODS:
        return None
    del config.quantization_config
    return method, {"options": given.get("options"), "layers": given.get("layers")}
