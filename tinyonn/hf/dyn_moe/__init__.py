"""DynMoE in models of transformers: dense MLPs of a trained model become mixtures of their own neurons.

Importing this package registers the loader of converted models with transformers.

    mlps         dense MLPs found in a model: weights, activation
    partition    their neurons into equal groups
    options      checked before a model is touched
    budget       surprise_budget as a keyword
    calibration  routers from a sample of text: prototypes, thresholds
    saving       the loader
    conversion   convert_mlp_to_dynmoe
"""

from .calibration import calibrate_experts, expert_statistics
from .conversion import convert_mlp_to_dynmoe
from .saving import DynMoEConversion, DynMoELoader

__all__ = ["DynMoEConversion", "DynMoELoader", "calibrate_experts", "convert_mlp_to_dynmoe", "expert_statistics"]
