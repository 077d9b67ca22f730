"""Hooks into Hugging Face transformers.

The names of `dyn_nsa` can be imported from here; doing so registers `attn_implementation="dyn_nsa"` and the loader of converted models.
Nothing that needs transformers is imported before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dyn_nsa import BudgetSchedule, collected_budget_loss, convert_attention, statistics

__all__ = ["BudgetSchedule", "collected_budget_loss", "convert_attention", "statistics"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import dyn_nsa

    return getattr(dyn_nsa, name)
