"""Wrappers that a conversion puts around the `forward` of a model."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import InputError


class ForwardAround:
    """A converted model's `forward`. Hooks of Module would not do: PEFT calls `model.forward`, which bypasses them.

    It is an object, not a closure, so that the model can be copied and pickled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.inner = model, model.forward
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [name for name, parameter in inspect.signature(self.inner).parameters.items() if parameter.kind in kinds]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def forward_around(model: nn.Module, kind: type[ForwardAround]) -> tuple[Any, Any]:
    """The model's wrapper of this kind, and the wrapper around it; None for one that does not exist."""
    outer, forward = None, model.__dict__.get("forward")
    while forward is not None and not isinstance(forward, kind):
        outer, forward = forward, getattr(forward, "inner", None)
    return forward, outer


def tokens_of(given: dict[str, Any]) -> Tensor | None:
    """Token ids or embeddings among the arguments of a model."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def refuse_replicas() -> nn.Module:
    raise InputError(
        "nn.DataParallel does not support converted models, because its copies share one forward; use DistributedDataParallel."
    )
