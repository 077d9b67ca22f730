"""Thresholds that read a wanted number of blocks on a sample of text, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore
from ..interfaces import gradients_kept
from ..peft_parts import keep_in_adapter
from .parts import PART, cores, mean_blocks

HIGHEST = 12.0  # nats above base: past it only forced blocks are left, for importance is at most the log of the number of blocks


@torch.no_grad()
def calibrate(model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]], target: float, *, steps: int = 12) -> float:
    """Shifts the thresholds of all layers together until a sample reads `target` key blocks a query; the openings end at 0.

    One number is shifted, so layers keep their differences. The sample is run `steps + 2` times. Statistics are reset.

    Args:
        model: one that `convert_attention` has changed, in eval or training mode, which stays.
        sample: (B, T) token ids, or the model's keyword arguments, of about the length that the model will see.
        target: key blocks per query, forced ones included.
        steps: halvings of the range of the shift; the last is less than a hundredth of a nat at 12.

    Returns:
        Mean key blocks a query that the sample reads then.

    Raises:
        InputError: not converted; an empty sample; a target that no shift reaches.
        ValueError: steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if next(cores(model), None) is None:
        raise InputError(f"calibrate must have a model that convert_attention has changed, got a plain {type(model).__name__}.")
    batches = [{"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) for batch in sample]
    if not batches:
        raise InputError("sample must have at least one batch, got none.")
    keep_in_adapter(model, PART)
    found = list(cores(model))
    before = [core.opening.clone() for core in found]
    training = model.training
    model.eval()
    try:
        low, high = min(core.start_opening for core in found), HIGHEST
        most, least = (_blocks(model, found, batches, shift) for shift in (low, high))
        if not least <= target <= most:
            raise InputError(f"target must be in {least:.2f} … {most:.2f}, what this sample can read, got {target}.")
        for _ in range(steps):
            middle = (low + high) / 2
            low, high = (middle, high) if _blocks(model, found, batches, middle) > target else (low, middle)
        reached = _blocks(model, found, batches, high)
        for core in found:
            core.base.add_(core.opening.to(core.base.dtype))
            core.opening.zero_()
            core.start_opening = 0.0
    except BaseException:
        for core, opening in zip(found, before, strict=True):
            core.opening.copy_(opening)
        raise
    finally:
        model.train(training)
    return reached


def _blocks(model: PreTrainedModel, found: list[DynNSACore], batches: list[dict[str, Any]], shift: float) -> float:
    for core in found:
        core.opening.fill_(shift)
        core.reset_statistics()
    with gradients_kept(model):
        for batch in batches:
            model(**{"use_cache": False, **batch})
    return mean_blocks(model, reset=True)
