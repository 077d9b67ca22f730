"""Training steps in which surprise trains the router."""

from ..nn.surprise_loss import SurpriseLoss
from .captured_surprise import CapturedSurprise, capture_surprise
from .gating import GatingGradients, capture, gating_gradients
from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult
from .surprise_hooks import SurpriseHookManager

__all__ = [
    "CapturedSurprise",
    "GatingGradients",
    "HyperStep",
    "HyperStepMixin",
    "HyperStepResult",
    "SurpriseHookManager",
    "SurpriseLoss",
    "capture",
    "capture_surprise",
    "gating_gradients",
]
