"""A budget for all mixtures of a model, for models whose layers do not pass it on.

A context sets the budget for the calls within its block, in the calling thread. Backward may recompute a layer later and in another
thread; `carry_surprise_budget` gives the recomputation the budget of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._debug import debug_enabled
from ._surrounding import held, places_of

Budget = Tensor | float


@contextmanager
def surprise_budget_of(model: nn.Module, surprise_budget: Budget) -> Iterator[None]:
    """Sets the budget of every mixture of the model that routes by budget, within the block and in this thread.

        with surprise_budget_of(model, 0.6):
            logits = model(input_ids)

    An inner context overrides an outer one, and an argument of the mixture's own call overrides both. Layers that you checkpoint yourself
    need `carry_surprise_budget`.

    Args:
        model: a model with at least one `nn.DynMoE` or `nn.DynSMHA` of routing="budget", or such a layer.
        surprise_budget: budget above 0 and at most 1; a number, 0-d, or of the leading shape of the mixtures' inputs, (B, T), in which a
            dimension may be 1: (B, 1) is a budget for each row. The values of a tensor are checked on the CPU; on other devices only
            under `tinyonn.debug()`.

    Raises:
        TypeError, ValueError: the budget has the wrong type or is out of range; no mixture of the model routes by budget. The mixture's
            call raises the error for a wrong shape.
    """
    check_budget(surprise_budget)
    places = places_of(model, "surrounding_budget")
    if not places:
        raise ValueError(
            f"surprise_budget must go to mixtures with routing='budget', got {type(model).__name__}, where none routes by budget."
        )
    with held([(place, surprise_budget) for place in places]):
        yield


def carry_surprise_budget(layer: nn.Module, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function that calls the layer with the budgets that surround it now, at any later time and in any thread.

        checkpoint(carry_surprise_budget(layer), hidden_states, use_reentrant=False)

    Args:
        layer: layer whose budgets are carried.
        function: function to call instead of the layer.
    """
    budgets = [(place, place.value) for place in places_of(layer, "surrounding_budget")]
    call: Callable[..., Any] = layer if function is None else function
    if not budgets or (torch.compiler.is_compiling() and all(value is None for _, value in budgets)):
        return call  # no budget to carry; compiled code has none that backward could see instead

    def carried(*args: Any, **kwargs: Any) -> Any:
        with held(budgets):
            return call(*args, **kwargs)

    return carried


def check_budget(surprise_budget: Budget) -> None:
    """TypeError or ValueError if the budget has the wrong type or is out of range."""
    rule = "surprise_budget must be above 0 and at most 1"
    if isinstance(surprise_budget, Tensor):
        if not surprise_budget.is_floating_point():
            raise TypeError(f"surprise_budget must be of floating point, got {surprise_budget.dtype}.")
        if not torch.compiler.is_compiling() and (surprise_budget.device.type == "cpu" or debug_enabled()):
            outside = surprise_budget[~((surprise_budget > 0) & (surprise_budget <= 1))]  # NaN too
            if len(outside):
                raise ValueError(f"{rule}, got {outside[0].item():g}.")
    elif isinstance(surprise_budget, bool) or not isinstance(surprise_budget, int | float):
        raise TypeError(f"surprise_budget must be a number or a tensor, got {type(surprise_budget).__name__}.")
    elif not 0 < surprise_budget <= 1:
        raise ValueError(f"{rule}, got {surprise_budget}.")


def budget_of_tokens(surprise_budget: Budget, shape: torch.Size) -> Budget:
    """The budget as a number, 0-d, or (N,), for N tokens of this leading shape."""
    if not isinstance(surprise_budget, Tensor) or not surprise_budget.dim():
        return surprise_budget
    given = surprise_budget.shape
    if len(given) != len(shape) or any(a not in (1, b) for a, b in zip(given, shape, strict=True)):
        raise ValueError(f"surprise_budget must be a number or of shape {tuple(shape)}, where a size may be 1, got {tuple(given)}.")
    return surprise_budget.expand(shape).reshape(-1)
