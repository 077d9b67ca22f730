"""A token that is not finite: NaN out for it alone; a training that meets one says so."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import tinyonn
from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep, capture_surprise, gating_gradients

OTHERS = [0, 1, 3, 4, 5, 6, 7]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(16, 8, **{"num_experts": 6, "target_k": 2.5, "max_experts": 4, "thresholds": "learned", **options})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"combine": "gated"}, {"combine": "unit"}, {"routing": "budget"}, {"form": "cosine", "target_k": 1.0}, {"checkpoint": True}],
    ids=str,
)
def test_it_gives_nan_and_the_others_are_as_without_it(options, value):
    module, x = mixture(**options), tokens(8, 16)
    results = []
    for element in (0.5, value):
        given = x.clone()
        given[2, 7] = element
        given.requires_grad_()
        module.zero_grad()
        module.reset_statistics()
        with capture_surprise(module) as surprise:
            out = module(given)
            out[OTHERS].square().sum().backward(retain_graph=True)
        results.append((out.detach()[OTHERS], given.grad[OTHERS], surprise[""][OTHERS]))
        if element is value:
            assert out[2].isnan().all()
            assert int(module.tokens_seen) == 7
            assert module.statistics()["mean_k"] == module.route(x).count[OTHERS].mean()
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)  # products of other sizes round differently


def test_the_surprise_of_a_token_that_is_not_finite_is_nan_not_infinite():
    module, x = mixture(), tokens(8, 16)
    x[2] = math.nan
    with capture_surprise(module) as surprise:
        module(x).square().sum().backward()
    assert surprise[""][2].isnan().any()
    assert not surprise[""][OTHERS].isnan().any()


def readme_loop() -> tuple[nn.Sequential, HyperStep]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), mixture(), nn.Linear(16, 8))
    return model, HyperStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def test_a_training_that_meets_nan_shows_it_in_every_loss_from_then_on():
    """The README's loop with one NaN in step 3."""
    model, step = readme_loop()
    losses = []
    for number in range(6):
        x = tokens(32, 8, seed=number)
        if number == 3:
            x[5, 2] = math.nan
        result = step(lambda x=x: (model(x) - x.sin()).square().mean())
        losses.append((float(result.loss), float(result.gating_loss)))
    assert all(math.isfinite(value) for pair in losses[:3] for value in pair)
    assert all(math.isnan(value) for pair in losses[3:] for value in pair)
    assert model(tokens(4, 8)).isnan().all()


class FiniteForward(torch.autograd.Function):
    """Finite in forward, NaN in backward, as the square root of 0 is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.nan)


def test_debug_names_the_mixture_whose_gating_loss_is_nan():
    model, step = readme_loop()
    before = copy.deepcopy(model.state_dict())
    with tinyonn.debug(), pytest.raises(ValueError, match="the gating loss of '1' must be finite, got nan") as caught:
        step(lambda: FiniteForward.apply(model(tokens(9, 8))).square().mean())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "counts" not in name)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert math.isfinite(step(lambda: model(tokens(9, 8)).square().mean()).loss)


def test_debug_names_the_parameters_whose_gradients_are_nan():
    model, step = readme_loop()
    with tinyonn.debug(), pytest.raises(ValueError, match=r"gradients must be finite, got NaN or infinity in 0\.weight, 0\.bias\.$"):
        step(lambda: model[1:](FiniteForward.apply(model[0](tokens(9, 8)))).square().mean())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_debug_lets_a_scaler_meet_overflow():
    """With AMP's scale gradients overflow now and then; the scaler skips such a step."""
    model, _ = readme_loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    step = HyperStep(model, torch.optim.AdamW(model.parameters()), scaler=scaler)
    with tinyonn.debug():
        step(lambda: (1e4 * model[0](tokens(9, 8))).square().mean() + model(tokens(9, 8)).square().mean())
    assert scaler.get_scale() < 2.0**126


def test_debug_names_a_gating_loss_of_the_context_too():
    model, _ = readme_loop()
    with tinyonn.debug(), pytest.raises(ValueError, match="the gating loss of '1' must be finite, got nan"), gating_gradients(model):
        FiniteForward.apply(model(tokens(9, 8))).square().mean().backward()
    assert all(parameter.grad is None for parameter in model[1].router.parameters() if parameter.grad is None)
