"""Training steps in which surprise trains the router, and the life of experts."""

from typing import TYPE_CHECKING, Any

from ..nn.expert_pools import expert_pools
from ..nn.surprise_loss import SurpriseLoss
from .captured_surprise import CapturedSurprise, capture_surprise
from .eavi import EaviBatch, EaviStepResult, Ramp, alignment, eavi_batch, eavi_step, excursion
from .gating import GatingGradients, capture, gating_gradients
from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult
from .integrity import PredictiveIntegrity, output_entropy, predictive_integrity, regeneration_rate
from .lazy_adamw import LazyAdamW
from .lifecycle import ExpertLifecycle, LifeEvent
from .surprise_hooks import SurpriseHookManager

if TYPE_CHECKING:
    from .eavi_trainer import Eavi, EaviMixin
    from .onn_trainer import OnnTrainer
    from .perpetual import PerpetualMixin

__all__ = [
    "CapturedSurprise",
    "Eavi",
    "EaviBatch",
    "EaviMixin",
    "EaviStepResult",
    "ExpertLifecycle",
    "GatingGradients",
    "HyperStep",
    "HyperStepMixin",
    "HyperStepResult",
    "LazyAdamW",
    "LifeEvent",
    "OnnTrainer",
    "PerpetualMixin",
    "PredictiveIntegrity",
    "Ramp",
    "SurpriseHookManager",
    "SurpriseLoss",
    "alignment",
    "capture",
    "capture_surprise",
    "eavi_batch",
    "eavi_step",
    "excursion",
    "expert_pools",
    "gating_gradients",
    "output_entropy",
    "predictive_integrity",
    "regeneration_rate",
]


def __getattr__(name: str) -> Any:
    if name == "OnnTrainer":  # transformers' Trainer takes seconds to import
        from .onn_trainer import OnnTrainer

        return OnnTrainer
    if name in ("Eavi", "EaviMixin"):
        from . import eavi_trainer

        return getattr(eavi_trainer, name)
    if name == "PerpetualMixin":
        from .perpetual import PerpetualMixin

        return PerpetualMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
