"""`surprise_budget` as a keyword of a converted model. Its layers would not pass the keyword to their mixtures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...nn import DynMoE, carry_surprise_budget, surprise_budget_of, token_mask_of
from .._forward import ForwardAround, forward_around, refuse_replicas, tokens_of

KEYWORD = "surprise_budget"


def take_surprise_budget(model: PreTrainedModel) -> None:
    """Gives the model and its base model a `forward` that takes the keyword.

    Models that route by threshold get it too, and raise an error for the keyword: layers of transformers ignore unknown keywords.
    """
    for part in dict.fromkeys((model, model.base_model)):
        if forward_around(part, BudgetForward)[0] is None:
            part.forward = BudgetForward(part)
            part._replicate_for_data_parallel = refuse_replicas  # type: ignore[method-assign]


class BudgetForward(ForwardAround):
    @property
    def __signature__(self) -> inspect.Signature:
        """With the keyword, because `generate` and Trainer read the accepted arguments from the signature."""
        own = super().__signature__
        parameters = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [parameter for parameter in own.parameters.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        keyword = inspect.Parameter(KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=None)
        return own.replace(parameters=[*parameters, keyword, *others])

    def __call__(self, *args: Any, surprise_budget: Any = None, **kwargs: Any) -> Any:
        if self.model.training and torch.is_grad_enabled():
            carry_through_checkpoints(self.model)
        mask = self._token_mask(self.by_name(args, kwargs))
        counted = nullcontext() if mask is None else token_mask_of(self.model, mask)
        within = nullcontext() if surprise_budget is None else surprise_budget_of(self.model, surprise_budget)
        with counted, within:
            return self.inner(*args, **kwargs)

    def _token_mask(self, given: dict[str, Any]) -> Tensor | None:
        """(B, T), tokens that the mixtures' statistics count, from the attention mask; None under a surrounding `token_mask_of`."""
        mask, tokens = given.get("attention_mask"), tokens_of(given)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or tokens is None:
            return None
        if any(module.surrounding_mask.value is not None for module in self.model.modules() if isinstance(module, DynMoE)):
            return None
        return mask[:, -tokens.shape[1] :]


def carry_through_checkpoints(model: nn.Module) -> None:
    """Makes checkpointed layers of transformers recompute with the budget of their forward. Enabling checkpointing undoes it."""
    for module in list(model.modules()):
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CarryingCheckpoint):
            setattr(module, "_gradient_checkpointing_func", CarryingCheckpoint(module, function))  # noqa: B010  # as transformers does


class CarryingCheckpoint:
    """A layer's checkpointing function. Recomputation uses the budget of the forward."""

    def __init__(self, layer: nn.Module, inner: Callable[..., Any]) -> None:
        self.layer, self.inner = layer, inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.inner(carry_surprise_budget(self.layer, function), *args, **kwargs)
