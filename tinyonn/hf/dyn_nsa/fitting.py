"""How much a block's attention is worth to the loss, given its estimated share, in each head, and the thresholds that follow.

    E[e² | x] = exp(a_h + β_h x)        x, e² of `measures`, h one of N key/value heads of the model

A Poisson quasi-likelihood with a log link fits a_h and β_h. For a given β, the best a is log(Σ e² / Σ exp(βx)). What is left is
n · (β · x̄_e − log Σ exp(βx)) for n pairs, with x̄_e the mean of x weighted by e². It is concave in β, and Newton's method finds its maximum.
A ridge pulls the β of each head towards the one β that fits all of them best with a level a_h for each.

A head reads a block where a_h + β_h x is at least one number for the model, so its threshold is linear in that number. With the price as
the mean threshold:

    threshold_h = price · gain_h + base_h        gain_h = c / β_h, of mean 1        base_h = (mean_h'(gain a) − a_h) · gain_h / c

Source: McCullagh and Nelder, "Generalized Linear Models", 2nd edition, 1989, chapters 6 and 9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError

RIDGE = 5.0  # pairs · nats²: of the pull towards the shared β, and of that β towards START_POWER
START_POWER = 1.3  # e² grows about as the share to this power, in SmolLM2-135M; 2 if estimates were exact
LEAST_PAIRS = 50  # of a fit of a head's own
LEAST_POWER, MOST_POWER = 0.25, 4.0  # of β
MOST_GAIN = 2.0  # 1 / MOST_GAIN is the least
FARTHEST = 4.0  # nats of a threshold from the median, at the middle x: a head that has no effect at all
STEPS = 50  # of Newton's method at most, and of bisection


class HeadPairs(NamedTuple):
    """Pairs of a query and a block of one key/value head."""

    x: Tensor  # (n,)
    effect: Tensor  # (n,) e²
    weight: Tensor  # (n,)

    @property
    def measured(self) -> bool:
        """Whether the pairs suffice for a fit of this head's own."""
        return len(self.x) >= LEAST_PAIRS and bool(self.effect.any()) and bool((self.x != self.x[0]).any())

    def level(self, power: float) -> float:
        """The best a for this β; −inf without effect, NaN without pairs."""
        logs = torch.cat([(self.weight * self.effect).sum().log()[None], torch.logsumexp(self.weight.log() + power * self.x, 0)[None]])
        return float(logs[0] - logs[1])


def thresholds(heads: list[HeadPairs]) -> tuple[Tensor, Tensor]:
    """gain and base of each head, (N,) float64, of means 1 and 0.

    A head that the sample does not measure gets the shared β: one with fewer than `LEAST_PAIRS` pairs, without any effect, or whose x are
    all equal. Its level is that of its mean effect, and the median without any pair. No threshold is farther than `FARTHEST` from the
    median at the middle x, and gains stay in 1 / `MOST_GAIN` … `MOST_GAIN`, with the levels that fit them.

    Raises:
        InputError: an effect is not finite, or all are 0.
    """
    heads = [HeadPairs(*(part.double().cpu() for part in head)) for head in heads]
    if any(not head.effect.isfinite().all() for head in heads) or not any(head.effect.any() for head in heads):
        raise InputError("gradient of the loss over the sample must be finite, and not 0 in every head.")
    own = [head for head in heads if head.measured]
    shared = _power(own, START_POWER)
    powers = torch.tensor([_power([head], shared) if head.measured else shared for head in heads], dtype=torch.float64)
    scale, gain = _gains(powers)
    level = torch.tensor([head.level(scale / float(g)) for head, g in zip(heads, gain, strict=True)], dtype=torch.float64)
    middle = torch.stack([head.x.mean() for head in heads if len(head.x)]).mean()
    some = level.isfinite()
    found = middle * gain + ((gain * level)[some].sum() / gain[some].sum() - level) * gain / scale  # thresholds at a price of about middle
    median = found[~found.isnan()].median()
    found = torch.where(found.isnan(), median, found).clamp(median - FARTHEST, median + FARTHEST)
    base = found - middle * gain
    return gain, base - base.mean() * gain


def _gains(powers: Tensor) -> tuple[float, Tensor]:
    """c, and c / β within bounds, of mean 1."""
    low, high = float(powers.min().log()), float(powers.max().log())
    for _ in range(STEPS):
        middle = (low + high) / 2
        gain = (math.exp(middle) / powers).clamp(1 / MOST_GAIN, MOST_GAIN)
        low, high = (middle, high) if gain.mean() < 1 else (low, middle)
    return math.exp(middle), gain / gain.mean()


def _power(heads: list[HeadPairs], towards: float) -> float:
    """The one β of these heads, with a level for each."""
    power, centre = towards, [float((head.weight * head.effect * head.x).sum() / (head.weight * head.effect).sum()) for head in heads]
    for _ in range(STEPS):
        slope, bend = -RIDGE * (power - towards), RIDGE
        for head, wanted in zip(heads, centre, strict=True):
            share = torch.softmax(head.weight.log() + power * head.x, 0)
            mean = (share * head.x).sum()
            slope += len(head.x) * float(wanted - mean)
            bend += len(head.x) * float((share * (head.x - mean).square()).sum())
        step = min(max(slope / bend, -0.5), 0.5)
        power += step
        if abs(step) < 1e-9:
            break
    return min(max(power, LEAST_POWER), MOST_POWER)
