"""The number of experts of a token follows its predicted surprise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinyonn.nn import DynMoE
from tinyonn.ops import Routing

E, F, K = 8, 16, 2.0


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(F, 8, E, **{"target_k": K, "max_experts": 6, "thresholds": "balanced", "demand": 0.5, "level": 1.0, **options})


def costs(module: DynMoE, x: torch.Tensor, slope: torch.Tensor) -> np.ndarray:
    """q of each token, by hand: each expert's part of a loss that is linear in the output, alone."""
    routing = module.route(x)
    found = []
    with torch.no_grad():
        for slot in range(routing.top_k_index.shape[1]):
            weights = torch.zeros_like(routing.top_k_weights)
            weights[:, slot] = routing.top_k_weights[:, slot]
            found.append((module.execute(x, Routing(routing.top_k_index, weights, *routing[2:])) * slope).sum(-1))
    parts, used = torch.stack(found, 1).double(), routing.top_k_index < E
    return ((parts**2).sum(1) / used.sum(1)).numpy()


def predicted(module: DynMoE, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x at rms 1 and one, and u."""
    wide = x.double().numpy()
    inputs = np.concatenate([wide / np.sqrt((wide**2).mean(1, keepdims=True)), np.ones((len(x), 1))], 1)
    return inputs, inputs @ module.router.head.head.double().numpy()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_backward_teaches_the_head_by_the_gamma_deviance(scale):
    module, x, slope = mixture(), tokens(50, F), tokens(50, F, seed=1)
    module.router.head.head.copy_(0.3 * tokens(F + 1, seed=2))
    slope[:5] = 0  # no loss depends on them
    mask = torch.arange(50) < 45
    (module(x, token_mask=mask) * scale * slope).sum().backward()
    q, (inputs, u) = costs(module, x, slope), predicted(module, x)
    counted = (q > 0) & mask.numpy()
    assert counted.sum() == 40
    ratio = q[counted] / q[counted].mean() * np.exp(-u[counted])
    assert (ratio > 6).any()
    wanted = (1 - np.minimum(ratio, 6)) @ inputs[counted]
    pending = module.router.head.pending.double().numpy()
    np.testing.assert_allclose(pending[: F + 1], wanted, rtol=1e-3, atol=1e-3)
    assert pending[F + 1] == 40
    np.testing.assert_allclose(pending[F + 2 : -1], inputs[:45, :F].sum(0), rtol=1e-4, atol=1e-4)
    assert pending[-1] == 45
    before = module.router.head.head.clone()
    module(x)
    # The first step of Adam is the sign of the gradient times the rate.
    np.testing.assert_allclose(module.router.head.head - before, -0.1 / F**0.5 * np.sign(wanted), rtol=1e-3)
    np.testing.assert_allclose(module.router.head.centre, inputs[:45, :F].mean(0), rtol=1e-4, atol=1e-5)


def test_a_token_of_more_predicted_surprise_exceeds_lower_thresholds():
    module, x = mixture(), tokens(40, F)
    plain = module.route(x).scores
    assert (module.route(x).count == K).all()
    router = module.router
    router.head.head.copy_(tokens(F + 1, seed=2))
    router.head.centre.copy_(0.1 * tokens(F, seed=3))
    router.spread.fill_(0.7)
    _, u = predicted(module, x)
    u = u - router.head.centre.double().numpy() @ router.head.head[:-1].double().numpy() - float(router.head.head[-1])
    wanted = plain.double().detach().numpy() + 0.5 * 0.7 * np.clip(u, -3, 3)[:, None]
    np.testing.assert_allclose(module.route(x).scores.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert (np.abs(u) > 3).any()


def test_hard_tokens_get_more_experts_and_the_mean_is_held():
    """Half of the tokens, told by one feature, have a loss twenty times as steep."""
    module = mixture()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(number, F, generator=generator)
        hard = torch.rand(number, generator=generator) < 0.5
        x[:, 0] = torch.where(hard, 2.0, -2.0)
        return x, hard

    for number in range(200):
        x, hard = batch(300)
        ((module(x) - x.roll(1, -1)).square().mean(-1) * torch.where(hard, 20.0, 1.0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 149:
            module.reset_statistics()
    assert module.statistics()["mean_k"] == pytest.approx(K, rel=0.03)
    module.eval().reset_statistics()
    x, hard = batch(6000)
    count = module.route(x).count
    assert count[hard].mean() > 1.5 * count[~hard].mean()
    assert count.mean().item() == pytest.approx(K, rel=0.03)


def test_a_step_of_the_head_does_not_move_the_mean_of_what_is_allowed():
    """Inputs far from 0, whose predictions all move when the head moves."""
    module, x = mixture(), tokens(500, F) + 3 * tokens(F, seed=1)
    for _ in range(3):
        module(x).square().mean().backward()
        head = module.router.head
        before = head.head.clone()
    module(x)
    assert (head.head - before).abs().max() > 0.01
    assert abs(float(predicted(module, x)[1].mean())) > 0.2
    assert head(x).mean().abs() < 1e-3


class Twice(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.moe, self.kind = mixture(checkpoint=kind == "option"), kind
        self.call = torch.compile(self.moe, backend="aot_eager", fullgraph=True) if kind == "compiled" else self.moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + (checkpoint(self.call, x, use_reentrant=self.kind == "reentrant") if "reentrant" in self.kind else self.call(x))
        return x


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "option", "compiled"])
def test_checkpointing_and_compilation_change_nothing(kind):
    plain, other = Twice("plain"), Twice(kind)
    for model in (plain, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for number in range(4):
            model(tokens(50, F, seed=number).requires_grad_()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = plain.moe.state_dict()
    assert wanted["router.head.head"].abs().max() > 0.01
    for name, value in other.moe.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_and_copies_leave_the_head_as_it_is():
    module, x = mixture(), tokens(50, F)
    for _ in range(2):
        module(x).square().mean().backward()
    start = copy.deepcopy(module.state_dict())
    other = copy.deepcopy(module)
    other(x).square().mean().backward()
    module.eval()(x).square().mean().backward()
    for name, value in module.state_dict().items():
        assert torch.equal(value, start[name]), name
    assert not torch.equal(other.router.head.head, start["router.head.head"])
    loaded = mixture()
    loaded.load_state_dict(start)
    assert torch.equal(loaded.eval()(x), module(x))


def test_nan_teaches_nothing():
    module, x = mixture(), tokens(50, F)
    x[3, 2] = float("nan")
    module(x).nan_to_num().square().mean().backward()
    assert module.router.head.pending.isfinite().all()
    assert module.router.head.pending[F + 1] == 49


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"demand": -1.0}, ValueError, "demand must be at least 0, got -1.0"),
        ({"demand": "much"}, TypeError, "demand must be a number, got str"),
        ({"thresholds": "learned", "level": 0.0}, ValueError, "demand must be 0 with thresholds='learned' or a form of cosines, got 0.5"),
        ({"form": "sigmoid_cosine", "level": 0.0}, ValueError, "demand must be 0 with thresholds='learned' or a form of cosines, got 0.5"),
    ],
)
def test_a_demand_that_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        mixture(**options)
