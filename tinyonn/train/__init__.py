"""Training steps in which surprise teaches the router."""

from .gating_gradients import GatingGradients, capture, gating_gradients
from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult
from .surprise_hooks import CapturedSurprise, SurpriseHookManager, capture_surprise

__all__ = [
    "CapturedSurprise",
    "GatingGradients",
    "HyperStep",
    "HyperStepMixin",
    "HyperStepResult",
    "SurpriseHookManager",
    "capture",
    "capture_surprise",
    "gating_gradients",
]
