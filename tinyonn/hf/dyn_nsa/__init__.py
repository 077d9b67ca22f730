"""DynNSA in models of transformers: `attn_implementation="dyn_nsa"`, and conversion of a trained model.

Importing this package registers three things: an attention function and the masks it takes, both named "dyn_nsa", with transformers; and
what rebuilds the parts of converted models, with `hf._converted`.

    parts        what conversion adds, found in a model: statistics, budget loss
    options      checked before a model is touched
    masks        where each row begins and ends
    decoding     blocks compressed once for a cache
    attention    the attention function
    hooks        what a converted model does before and after its forward
    saving       the parts from the record in a configuration
    conversion   convert_attention, and back
    calibration  thresholds for a budget, without training
    schedule     BudgetSchedule
"""

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports
from . import saving as _saving  # noqa: F401  # registers the conversion
from .attention import dyn_nsa_attention
from .calibration import calibrate
from .conversion import convert_attention, revert_attention
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
    "dyn_nsa_attention",
    "dyn_nsa_mask",
    "parameter_groups",
    "revert_attention",
    "statistics",
]

# Its base class, a Trainer's callback, makes transformers import PEFT and with it bitsandbytes: seconds, and lines on the terminal.
__getattr__, __dir__, _ = lazy_exports(__name__, {"BudgetSchedule": "schedule"})
