"""Thresholds of heads from a regression of the effect of a block on its estimated share, against one written out here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinyonn.errors import InputError
from tinyonn.hf.dyn_nsa.fitting import FARTHEST, LEAST_PAIRS, MOST_GAIN, HeadPairs, thresholds

from .regression import by_hand


def planted(level: float, power: float, number: int = 4000, seed: int = 0) -> HeadPairs:
    """Pairs of one head whose mean effect is exp(level + power · x)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(number, generator=draw, dtype=torch.float64) * 6 - 7
    noise = torch.empty(number, dtype=torch.float64).exponential_(generator=draw)  # of mean 1, widely spread
    return HeadPairs(x, (level + power * x).exp() * noise, torch.ones(number, dtype=torch.float64))


def levels(gain: Tensor, base: Tensor, price: float) -> Tensor:
    return price * gain + base


def test_thresholds_are_the_points_of_equal_effect():
    heads = [planted(-3.0, 1.4, seed=1), planted(-6.0, 1.0, seed=2), planted(-2.0, 1.8, 700, seed=3)]
    heads[1] = heads[1]._replace(weight=torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.5)
    gain, base = thresholds(heads)
    a, beta = by_hand(heads)
    assert gain.mean().item() == pytest.approx(1, abs=1e-9)
    assert base.mean().item() == pytest.approx(0, abs=1e-9)
    for price in (-3.0, -5.0, -6.5):
        effects = a + beta * levels(gain, base, price)
        torch.testing.assert_close(effects, effects.mean().expand(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(beta, torch.tensor([1.4, 1.0, 1.8], dtype=torch.float64), rtol=0, atol=0.2)  # as planted


def test_few_pairs_take_the_power_of_the_others():
    few = planted(-4.0, 0.3, LEAST_PAIRS, seed=4)
    heads = [planted(-3.0, 1.4, seed=1), planted(-3.0, 1.5, seed=2), few]
    own = [planted(-3.0, 1.4, seed=1), planted(-3.0, 1.5, seed=2), HeadPairs(*(part[:-1] for part in few))]
    assert thresholds(heads)[0][2] != pytest.approx(thresholds(own)[0][2].item(), abs=0.01)
    gain, base = thresholds(own)
    pooled = 1.45
    a = (own[2].effect.sum() / (pooled * own[2].x).exp().sum()).log()
    other, beta = by_hand(own[:2])
    wanted = other[0] + beta[0] * levels(gain, base, -4.0)[0]
    assert (a + pooled * levels(gain, base, -4.0)[2]).item() == pytest.approx(wanted.item(), abs=0.1)


@pytest.mark.parametrize("kind", ["no effect", "one x", "no pairs"])
def test_a_head_that_the_sample_does_not_measure(kind):
    heads = [planted(-3.0, 1.4, seed=1), planted(-3.5, 1.4, seed=2), planted(-3.0, 1.4, seed=3)]
    one = heads[2]
    heads[2] = {
        "no effect": one._replace(effect=torch.zeros_like(one.effect)),
        "one x": one._replace(x=torch.full_like(one.x, -4.0)),
        "no pairs": HeadPairs(*(part[:0] for part in one)),
    }[kind]
    gain, base = thresholds(heads)
    assert gain[2].item() == pytest.approx(gain[:2].mean().item(), abs=0.05)  # the shared power
    middle = sum(head.x.mean().item() for head in heads if len(head.x)) / sum(len(head.x) > 0 for head in heads)
    own = levels(gain, base, middle)
    match kind:
        case "no effect":
            assert own[2].item() == pytest.approx(own.median().item() + FARTHEST, abs=0.02)
        case "one x":
            a, beta = by_hand(heads[:2])
            effect = a[0] + beta[0] * levels(gain, base, -4.0)[0]
            assert (heads[2].effect.mean().log() + 1.4 * (levels(gain, base, -4.0)[2] + 4)).item() == pytest.approx(effect.item(), abs=0.1)
        case "no pairs":
            assert own[:2].min() <= own[2] <= own[:2].max()


def test_gains_stay_in_a_range_and_levels_follow():
    heads = [planted(-8.6 + 4 * power, power, seed=seed) for seed, power in enumerate((1.4, 1.4, 1.4, 0.05, -0.5, 9.0))]  # equal at -4
    gain, base = thresholds(heads)
    assert gain.mean().item() == pytest.approx(1, abs=1e-6)
    assert gain.max().item() == pytest.approx(MOST_GAIN)
    assert gain.min().item() == pytest.approx(1 / MOST_GAIN)
    # The level of a head whose power was moved is that of its own effects at this power.
    scale = gain[0] * by_hand(heads[:3])[1][0]
    a = [(head.effect.sum() / (scale / g * head.x).exp().sum()).log() for head, g in zip(heads, gain, strict=True)]
    effects = torch.stack([a[h] + scale / gain[h] * levels(gain, base, -4.0)[h] for h in (0, 3)])
    assert effects.std() < 0.1


def test_effects_that_are_not_finite_are_refused():
    good = planted(-3.0, 1.4)
    for effect in (torch.full_like(good.effect, math.nan), torch.full_like(good.effect, math.inf), torch.zeros_like(good.effect)):
        with pytest.raises(InputError, match="gradient of the loss over the sample must be finite, and not 0 in every head"):
            thresholds([good._replace(effect=effect)] * 2)
