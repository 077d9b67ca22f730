"""Training steps in which surprise teaches the router."""

from .hyper_step import HyperStep, HyperStepMixin, HyperStepResult, capture, gating_gradients

__all__ = ["HyperStep", "HyperStepMixin", "HyperStepResult", "capture", "gating_gradients"]
