"""Hooks into Hugging Face transformers.

Importing this package registers `attn_implementation="dyn_nsa"` and `experts_implementation="tinyonn"`, and TinyOnn models with the Auto
classes, and lets transformers build the parts of converted models wherever it builds a model (`hf._converted`).
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports
from . import experts as _experts  # noqa: F401  # registers an implementation
from ._install import install
from .dyn_moe import calibrate_experts, convert_mlp_to_dynmoe, expert_statistics
from .dyn_nsa import (
    calibrate,
    collected_budget_loss,
    convert_attention,
    distil_compression,
    parameter_groups,
    revert_attention,
    statistics,
)
from .interfaces import register_attention
from .tiny_onn import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel
from .tuning import TuningResult, tune_kernels

if TYPE_CHECKING:
    from .dyn_nsa.schedule import BudgetSchedule

install()

__all__ = [
    "BudgetSchedule",
    "TinyOnnConfig",
    "TinyOnnForCausalLM",
    "TinyOnnModel",
    "TuningResult",
    "calibrate",
    "calibrate_experts",
    "collected_budget_loss",
    "convert_attention",
    "convert_mlp_to_dynmoe",
    "distil_compression",
    "expert_statistics",
    "parameter_groups",
    "register_attention",
    "revert_attention",
    "statistics",
    "tune_kernels",
]

__getattr__, __dir__, _ = lazy_exports(__name__, {"BudgetSchedule": "dyn_nsa"})  # see there
