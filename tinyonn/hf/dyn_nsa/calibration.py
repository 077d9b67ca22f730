"""Thresholds with which queries read a given number of blocks on a sample of text, without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..._io.units import counted
from ...errors import InputError
from ...nn._search import bisect
from ...nn.dyn_nsa import DynNSACore
from ...ops._checks import check_number, check_size
from .._forward import tokens_of
from ..interfaces import gradients_kept, modes_kept
from ..peft_parts import keep_in_adapter
from .options import opening_of
from .parts import PART, cores, mean_blocks

HIGHEST = 12.0  # nats above base; beyond it queries read only forced blocks, because importance is at most log(number of blocks)
FORCED = 3  # blocks that a query always reads: the first, its own and the one before
LEAST = 2.25  # mean of 1, 2, 3, 3: blocks that queries of a text of four blocks, the shortest with a choice, are forced to read


@torch.no_grad()
def calibrate(model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]], target: float, *, steps: int = 12) -> float:
    """Shifts the thresholds of all layers until queries read `target` key blocks on average over a sample. It also sets all openings to 0.

    All thresholds move by the same amount, so differences between layers stay. The sample runs `steps + 2` times. Statistics are reset.

    Args:
        model: model that `convert_attention` has converted. It keeps its training or eval mode.
        sample: batches of (B, T) token ids, or of the model's keyword arguments, about as long as the texts that the model will see.
        target: key blocks per query, forced blocks included.
        steps: number of bisection steps; 12 determine the shift to less than 0.01 nats.

    Returns:
        Mean key blocks per query over the sample, after the shift.

    Raises:
        InputError: the model is not converted; the sample is empty or too short for the target; no shift reaches the target.
        ValueError: steps is below 1. TypeError, ValueError: target is not a finite number.
    """
    check_size("steps", steps)
    check_number("target", target)
    if next(cores(model), None) is None:
        raise InputError(f"model must be converted by convert_attention, got an unconverted {type(model).__name__}.")
    batches = [{"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) for batch in sample]
    if not batches:
        raise InputError("sample contains no batch.")
    keep_in_adapter(model, PART)
    found = list(cores(model))
    before = [core.opening.clone() for core in found]
    try:
        with modes_kept(model):
            model.eval()
            low, high = min(map(_all_open, found)), HIGHEST
            most, least = (_blocks(model, found, batches, shift) for shift in (low, high))
            _check_target(found, batches, target, least, most)
            shift = bisect(lambda shift: _blocks(model, found, batches, shift), target, low, high, steps)
            reached = _blocks(model, found, batches, shift)
        for core in found:
            core.base.add_(core.opening.to(core.base.dtype))
            core.opening.zero_()
            core.start_opening = 0.0
    except BaseException:
        for core, opening in zip(found, before, strict=True):
            core.opening.copy_(opening)
        raise
    return reached


def _blocks(model: PreTrainedModel, found: list[DynNSACore], batches: list[dict[str, Any]], shift: float) -> float:
    for core in found:
        core.opening.fill_(shift)
        core.reset_statistics()
    with gradients_kept(model):
        for batch in batches:
            model(**{"use_cache": False, **batch})
    return mean_blocks(model, reset=True)


def _all_open(core: DynNSACore) -> float:
    """Shift at which every block passes, even if an earlier calibration or training has moved the thresholds."""
    options = replace(core.options, base=core.base.max().item(), slope=core.slope.min().item())
    return min(core.start_opening, opening_of(options))


def _check_target(found: list[DynNSACore], batches: list[dict[str, Any]], target: float, least: float, most: float) -> None:
    """InputError if the sample cannot reach the target. With it, queries can read between `least` and `most` blocks."""
    limit = sum(map(_limit, found)) / len(found)
    if target >= limit:
        raise InputError(f"target must be below max_blocks={limit:g}, got {target}.")
    tokens, block_size = max(map(_longest, batches)), max(core.options.block_size for core in found)
    if target > most or tokens <= FORCED * block_size:
        if target < LEAST:
            raise InputError(f"target must be at least {LEAST} key blocks per query, because {FORCED} are always read, got {target}.")
        needed = max(_tokens_for(core, target) for core in found if _limit(core) > target)
        found_in = f"{counted(tokens, 'token')}, {counted(-(-tokens // block_size), 'block')} of {block_size}"
        raise InputError(
            f"sample is too short for target={target} key blocks per query: it has {found_in}, and needs about {needed:,} tokens."
        )
    if target < least:
        raise InputError(f"target must be in {least:.2f} … {most:.2f}, the range that this sample can reach, got {target}.")


def _limit(core: DynNSACore) -> float:
    return math.inf if core.options.max_blocks is None else core.options.max_blocks


def _longest(batch: dict[str, Any]) -> int:
    """Number of tokens of the longest text of a batch, without padding."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(positions, Tensor):
        return int(positions.max()) + 1  # also for packed texts
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int((mask != 0).sum(-1).max())
    tokens = tokens_of(batch)
    assert tokens is not None  # the model ran
    return int(tokens.shape[1])


def _tokens_for(core: DynNSACore, target: float) -> int:
    """Number of tokens of a text whose queries read `target` blocks on average if they read all, with at least one unforced block.

    In a text of n blocks, queries can read 1, 2 … n blocks, at most m = max_blocks. The mean is (n + 1) / 2, or m - m (m - 1) / 2n for
    n >= m.
    """
    blocks, limit = 2 * target - 1, _limit(core)
    if blocks > limit:
        blocks = limit * (limit - 1) / 2 / (limit - target)
    return max(math.ceil(blocks), FORCED + 1) * core.options.block_size
