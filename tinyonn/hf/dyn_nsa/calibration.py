"""Thresholds with which queries read a given number of blocks on a sample of text, without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..._io.units import counted
from ...errors import InputError
from ...nn.dyn_nsa import DynNSACore
from ...ops import DynNSAOutput
from ...ops._checks import check_choice, check_number
from .._forward import tokens_of
from .._sample_loss import backward_to_embeddings
from ..interfaces import modes_kept
from ..peft_parts import keep_in_adapter
from .fitting import thresholds
from .measures import HeadEffects, PriceSample
from .observing import Attended, checked_sample, run, set_price, watched
from .parts import PART, cores, set_options

Price = Literal["gradient", "none"]
VALUES = 2**24  # importances that a price is taken from
POINTS = 32  # of the prices of other budgets
CORRECTIONS = 4  # of the price, at most
CLOSE = 0.005  # relative error of the count at which a price stays


def calibrate(model: PreTrainedModel, sample: Iterable[Tensor | Mapping[str, Any]], target: float, *, price: Price = "gradient") -> float:
    """Sets the thresholds of all layers so that queries read `target` key blocks on average over a sample.

    One price for the model decides how many blocks are read. `gain` and `base` of each key/value head decide where. With price="gradient",
    one backward pass over the sample measures, for pairs of a query and a block, how much the next token's loss changes to first order if
    the block is left out. A Poisson regression of the square of this effect on the log of the block's estimated share, one for each
    key/value head, gives the effect that a head can expect at a share: E[e² | z] = exp(a + β z). At every price, the thresholds of all
    heads then lie at the same expected effect. A head with fewer than 50 pairs whose z is above -7, with effects of 0, or with only one z
    gets the β that fits all heads best. Gains stay in 0.5 … 2, and thresholds within 4 nats of the median.

    The price follows from the sorted importances of the sample. Each further run corrects it for what sparse layers change in the layers
    above: one or two as a rule, at most four. Statistics are reset. The prices of other budgets are noted, for
    `model(..., block_budget=...)`. The backward pass runs SDPA in layers whose gates are those of a new conversion; in others it takes far
    longer.

    Args:
        model: model that `convert_attention` has converted. It keeps its training or eval mode, its weights and their gradients.
        sample: batches of (B, T) token ids, or of the model's keyword arguments, about as long as the texts that the model will see.
        target: key blocks per query, forced blocks included, on average over layers, heads and tokens.
        price: "gradient" to measure effects, which needs a model with a language head; "none" to keep how the thresholds of heads differ.

    Returns:
        Mean key blocks per query over the sample, as the model now reads.

    Raises:
        InputError: the model is not converted; the sample is empty or too short for the target; no price reaches the target; an
            importance is NaN; with price="gradient", the model gives no logits, or the loss or its gradient is not finite.
        ValueError: price is not one of the two. TypeError, ValueError: target is not a finite number. TypeError: the sample is not an
            iterable of batches.

    Source of the regression: McCullagh and Nelder, "Generalized Linear Models", 2nd edition, 1989, chapters 6 and 9.
    """
    check_choice("price", price, get_args(Price))
    check_number("target", target)
    batches = checked_sample(model, sample)
    keep_in_adapter(model, PART)
    found = list(cores(model))
    before = [(core.base.detach().clone(), core.gain.clone(), core.price.clone()) for core in found]
    try:
        with modes_kept(model):
            model.eval()
            return _calibrated(model, found, batches, target, price)
    except BaseException:
        with torch.no_grad():
            for core, (base, gain, level) in zip(found, before, strict=True):
                core.base.copy_(base)
                core.gain.copy_(gain)
                core.price.copy_(level)
        raise
    finally:
        for core in found:
            core.reset_statistics()


def _calibrated(model: PreTrainedModel, found: list[DynNSACore], batches: list[dict[str, Any]], target: float, price: Price) -> float:
    values = PriceSample(min(1.0, VALUES / _pairs(found, batches)), seed=0)
    effects = {core: HeadEffects(core) for core in found} if price == "gradient" else {}

    def watch(call: Attended) -> None:
        values.add(call)
        if call.core in effects:
            effects[call.core].watch(call)

    with watched(found, watch):
        for batch in batches:
            if effects:
                backward_to_embeddings(model, batch)
            else:
                run(model, batch)
    rows, forced = values.rows, values.forced
    _check_target(found, batches, target, forced / rows, values.every / rows)
    values.check()
    if effects:
        gain, base = thresholds([pairs for core in found for pairs in effects[core].pairs()])
    else:
        gain, base = (torch.cat([getattr(core, name).detach().double().cpu() for core in found]) for name in ("gain", "base"))
        base = base - gain * (base.mean() / gain.mean())
    heads = [core.num_kv_heads for core in found]
    with torch.no_grad():
        for core, own_gain, own_base in zip(found, gain.split(heads), base.split(heads), strict=True):
            core.gain.copy_(own_gain)
            core.base.copy_(own_base)
    ordered = values.prices()
    wanted, far = target * rows - forced, 0.0  # far blocks
    tried: list[tuple[float, float, float]] = []  # blocks of the sorted sample, far blocks read, price
    place = wanted * len(ordered) / values.pairs
    while True:
        level = _price_at(ordered, place)
        set_price(found, level)
        far = _read(model, found, batches) - forced
        tried.append((place, far, level))
        if len(tried) == 1 + CORRECTIONS or abs(far - wanted) <= CLOSE * target * rows:
            break
        place = _corrected(tried, wanted, len(ordered))
    place, far, level = min(tried, key=lambda one: abs(one[1] - wanted))
    set_price(found, level)
    reached = (forced + far) / rows
    if abs(reached - target) > 0.02 * target and (far <= 0 or reached >= values.every / rows - 1e-6):
        which = "none" if far <= 0 else "all"
        raise InputError(
            f"no price reads target={target} key blocks per query on this sample, got {reached:.2f}: {which} of the blocks that are not "
            "forced pass, as their importances do not differ."
        )
    # What reads more or fewer far blocks, by the sample's order and how far it was off at this price.
    most, scale = (values.every - forced) / rows, place / far if far > 0 and place > 0 else len(ordered) / values.pairs
    points = [most * (i / POINTS) ** 2 for i in range(1, POINTS + 1)]
    prices = tuple((round(point, 6), round(_price_at(ordered, point * rows * scale), 6)) for point in points)
    set_options(model, prices=prices, prices_forced=forced / rows)
    return reached


def _price_at(ordered: Tensor, place: float) -> float:
    """Price that as many of these values pass, highest first."""
    number = min(max(round(place), 0), len(ordered))
    if number == 0:
        return float(ordered[0]) + 1
    if number == len(ordered):
        return float(ordered[-1]) - 1
    return float(ordered[number - 1] + ordered[number]) / 2


def _corrected(tried: list[tuple[float, float, float]], wanted: float, most: int) -> float:
    """Place to try next, on logarithms: between the nearest that read fewer and more, or on from the last two."""
    place, far, _ = tried[-1]
    if far <= 0 or place <= 0:
        return min(most, 4 * max(place, 1.0))
    real = sorted((one for one in tried if one[0] > 0 and one[1] > 0), key=lambda one: abs(one[1] - wanted))
    sides = [next((one for one in real if (one[1] > wanted) == more), None) for more in (False, True)]
    low, high = sides if None not in sides else (real[:2] if len(real) > 1 else (None, None))
    power = 1.0
    if low is not None and high is not None and low[0] != high[0]:
        power = min(max(math.log(high[1] / low[1]) / math.log(high[0] / low[0]), 0.3), 3.0)
    place, far, _ = real[0]
    return float(min(most, place * (wanted / far) ** (1 / power)))


def _read(model: PreTrainedModel, found: list[DynNSACore], batches: list[dict[str, Any]]) -> int:
    """Key blocks that the queries of the sample read, over all layers and heads."""
    total = 0

    def count(core: DynNSACore, args: Any, result: DynNSAOutput) -> None:
        nonlocal total
        total += int(result.counts.sum())

    with ExitStack() as stack:
        for core in found:
            stack.callback(core.register_forward_hook(count).remove)
        for batch in batches:
            run(model, batch)
    return total


def _pairs(found: list[DynNSACore], batches: list[dict[str, Any]]) -> float:
    """About how many blocks queries may leave out, at most."""
    total = 0.0
    for batch in batches:
        tokens = tokens_of(batch)
        rows, length = (1, 1) if tokens is None else tokens.shape[:2]
        total += sum(rows * core.num_kv_heads * length * length / (2 * core.options.block_size) for core in found)
    return max(total, 1.0)


def _check_target(found: list[DynNSACore], batches: list[dict[str, Any]], target: float, least: float, most: float) -> None:
    """InputError if the sample cannot reach the target. With it, queries can read between `least` and `most` blocks."""
    limit = sum(map(_limit, found)) / len(found)
    if target >= limit:
        raise InputError(f"target must be below max_blocks={limit:g}, got {target}.")
    tokens, block_size = max(map(_longest, batches)), max(core.options.block_size for core in found)
    forced = max(core.options.forced for core in found)
    if target > most or tokens <= forced * block_size:
        lowest = forced * (forced + 3) / 2 / (forced + 1)  # of the shortest text with a choice: 1, 2 … forced, forced blocks
        if target < lowest:
            raise InputError(f"target must be at least {lowest:g} key blocks per query, because {forced} are always read, got {target}.")
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
    return max(math.ceil(blocks), core.options.forced + 1) * core.options.block_size
