"""Training steps in which surprise trains the router."""

from ..nn.surprise_loss import SurpriseLoss
from .captured_surprise import CapturedSurprise, capture_surprise
from .gating import GatingGradients, capture, gating_gradients
from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult
from .integrity import PredictiveIntegrity, output_entropy, predictive_integrity, regeneration_rate
from .lifecycle import ExpertLifecycle, LifeEvent
from .surprise_hooks import SurpriseHookManager

__all__ = [
    "CapturedSurprise",
    "ExpertLifecycle",
    "GatingGradients",
    "HyperStep",
    "HyperStepMixin",
    "HyperStepResult",
    "LifeEvent",
    "PredictiveIntegrity",
    "SurpriseHookManager",
    "SurpriseLoss",
    "capture",
    "capture_surprise",
    "gating_gradients",
    "output_entropy",
    "predictive_integrity",
    "regeneration_rate",
]
