"""DynMoE in models of transformers: dense MLPs of a trained model become mixtures of their own neurons.

Importing this package registers the builder of converted models with `hf._converted`.

    mlps         dense MLPs of a model: weights, activation
    partition    division of their neurons into equal groups
    options      checks of options, before a model is changed
    budget       surprise_budget as a keyword
    sampling     a sample of text: inputs of the mixtures, contributions of experts
    price        how layers share one budget of experts
    calibration  routers from a sample: prototypes, thresholds
    saving       construction of the mixtures from the record in a configuration
    conversion   convert_mlp_to_dynmoe
"""

from . import saving as _saving  # noqa: F401  # registers the conversion
from .calibration import calibrate_experts, expert_statistics
from .conversion import convert_mlp_to_dynmoe

__all__ = ["calibrate_experts", "convert_mlp_to_dynmoe", "expert_statistics"]
