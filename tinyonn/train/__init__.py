"""Training steps in which surprise teaches the router."""

from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult, capture, gating_gradients
from .surprise_hooks import CapturedSurprise, SurpriseHookManager, capture_surprise

__all__ = [
    "CapturedSurprise",
    "HyperStep",
    "HyperStepMixin",
    "HyperStepResult",
    "SurpriseHookManager",
    "capture",
    "capture_surprise",
    "gating_gradients",
]
