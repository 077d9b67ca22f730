"""DynNSA in models of transformers: `attn_implementation="dyn_nsa"`, and conversion of a trained model.

Importing this package registers an attention function and its mask function with transformers, both named "dyn_nsa", and the builder of
converted models with `hf._converted`.

    parts        access to the added parts of a model: statistics, budget loss
    options      checks of options, before a model is changed
    masks        the mask function: bounds of rows and sequences
    decoding     compressed blocks, kept between forwards with a cache
    hooks        steps before and after the forward of a converted model
    shares       shares of blocks in an attention, for some queries of a text
    observing    calls of the layers watched while a sample runs
    attention    the attention function
    saving       construction of the parts from the record in a configuration
    conversion   convert_attention, revert_attention
    measures     what a calibration measures on watched calls
    calibration  thresholds for a budget, without training
    distillation compressed keys taught by the model's own attention
    schedule     BudgetSchedule
"""

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports
from . import saving as _saving  # noqa: F401  # registers the conversion
from .attention import dyn_nsa_attention
from .calibration import calibrate
from .conversion import convert_attention, revert_attention
from .distillation import distil_compression
from .masks import dyn_nsa_mask
from .parts import DYN_NSA, collected_budget_loss, cores, parameter_groups, statistics

if TYPE_CHECKING:
    from .schedule import BudgetSchedule

__all__ = [
    "DYN_NSA",
    "BudgetSchedule",
    "calibrate",
    "collected_budget_loss",
    "convert_attention",
    "cores",
    "distil_compression",
    "dyn_nsa_attention",
    "dyn_nsa_mask",
    "parameter_groups",
    "revert_attention",
    "statistics",
]

# Lazy: the base class, a Trainer's callback, makes transformers import PEFT and bitsandbytes, which takes seconds and prints lines.
__getattr__, __dir__, _ = lazy_exports(__name__, {"BudgetSchedule": "schedule"})
