"""The parts that a conversion adds to a model, their running statistics and the budget loss of a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore, loss_of_calls
from ...ops._checks import check_number
from .._converted import converted_model, recorded
from ..peft_parts import active, active_modules, running_statistics

DYN_NSA = "dyn_nsa"  # attention implementation in a configuration
PART = "dyn_nsa"  # name of a core within its attention module
ARRIVALS = "dyn_nsa_arrivals"  # keyword of a call with a price or a tau: a list to which each layer that gets the keywords adds its core
_TAKEN = "loss_taken"  # attribute of a core


def cores(model: nn.Module) -> Iterator[DynNSACore]:
    """The parts that the conversion added, in the order of the layers; under PEFT, the active ones."""
    return (module for module in active_modules(model).values() if isinstance(module, DynNSACore))


def core_of(module: nn.Module) -> DynNSACore | None:
    """The part that an attention module uses; under a wrapper such as PEFT's `modules_to_save`, the active one."""
    part: Any = module._modules.get(PART)
    part = None if part is None else active(part)
    # Other wrappers forward attribute access, so a bound method leads to the part that runs.
    return part if part is None or isinstance(part, DynNSACore) else part.tau_of.__self__


def attention_of(config: Any) -> str:
    """Name of the attention implementation that a model with this configuration runs."""
    running: str = config.get_text_config(decoder=True)._attn_implementation
    return running


def set_options(model: nn.Module, **values: Any) -> None:
    """Sets options of all layers, and in the record of the model that holds them.

    Raises:
        TypeError, ValueError: a value that `DynNSAOptions` refuses; nothing is set then.
    """
    found = list(cores(model))
    for core in found:
        replace(core.options, **values)  # checks the values; layers share an options object, so it is changed in place below
    for core in found:
        for name, value in values.items():
            if getattr(core.options, name) != value:
                setattr(core.options, name, value)
    if (converted := converted_model(model, DYN_NSA)) is not None:  # a layer of one's own has no record
        recorded(converted.config)[DYN_NSA]["options"].update(values)


def statistics(model: nn.Module, *, reset: bool = False) -> dict[str, dict[str, float]]:
    """Running statistics of each converted layer, by name; see `DynNSACore.statistics`.

    Args:
        reset: whether to reset the statistics afterwards.
    """
    return running_statistics(model, DynNSACore, reset)


def parameter_groups(
    model: nn.Module, *, lr: float, parts_lr: float = 3e-4, threshold_lr: float = 0.03, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser. Thresholds are in nats and need a larger learning rate than weights; gates must not decay.

    Args:
        lr, weight_decay: learning rate and weight decay of the model's own parameters.
        parts_lr: learning rate of gates and compression.
        threshold_lr: learning rate of base and slope.

    Returns:
        Groups of the parameters that require a gradient, without empty groups.

    Raises:
        InputError: the model is not converted.
        TypeError, ValueError: a number is negative, not finite, or not a number.
    """
    for name, value in (("lr", lr), ("parts_lr", parts_lr), ("threshold_lr", threshold_lr), ("weight_decay", weight_decay)):
        check_number(name, value, at_least=0)
    found = list(cores(model))
    if not found:
        raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
    thresholds = {parameter: None for core in found for parameter in (core.base, core.slope)}
    parts = {parameter: None for core in found for parameter in core.parameters() if parameter not in thresholds}
    own = [parameter for parameter in model.parameters() if parameter not in thresholds and parameter not in parts]
    groups = [
        {"params": own, "lr": lr, "weight_decay": weight_decay},
        {"params": list(parts), "lr": parts_lr, "weight_decay": 0.0},
        {"params": list(thresholds), "lr": threshold_lr, "weight_decay": 0.0},
    ]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]  # type: ignore[attr-defined]
    return [group for group in groups if group["params"]]


def collected_budget_loss(model: nn.Module) -> Tensor:
    """Budget loss and distillation loss of the last forward in training mode: of the means over all layers, heads and tokens. With labels,
    the model adds them to its own loss instead.

    Returns:
        0-d.

    Raises:
        RuntimeError: there was no such forward, or its loss was collected already.
    """
    loss = take_budget_loss(cores(model))
    if loss is None:
        raise RuntimeError("there is no loss of the attention to collect; first run a converted model in training mode, without labels.")
    return loss


def take_budget_loss(parts: Iterable[DynNSACore]) -> Tensor | None:
    found, first = [], None
    for core in parts:
        if core.collected:
            found.extend(core.collected)
            first = first or core
            setattr(core, _TAKEN, True)
        core.collected = []
    if first is None:
        return None
    return loss_of_calls(found, first.options, first.budget_target)


def take_counts(model: nn.Module) -> tuple[float, float, int]:
    """Counts in training since the last call, over all layers, heads and ranks: mean key blocks per query, those of them beyond the forced
    ones, and number of queries.

    Layers count from the first call on.
    """
    found = list(cores(model))
    sums = torch.zeros(3, dtype=torch.float64)
    for core in found:
        if core.counted is None or core.counted.device != core.sums.device:
            core.counted = torch.zeros(3, device=core.sums.device)
        sums += core.counted.cpu()
        core.counted.zero_()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = sums.to(found[0].sums.device, torch.float32)
        torch.distributed.all_reduce(sums)
    blocks, far, rows = sums.tolist()
    return blocks / max(rows, 1), far / max(rows, 1), int(rows)


def loss_was_taken(model: nn.Module) -> bool:
    """Whether the losses of the attention were taken since the last call."""
    taken = [core for core in cores(model) if getattr(core, _TAKEN, False)]
    for core in taken:
        setattr(core, _TAKEN, False)
    return bool(taken)
