"""A step that fails or is interrupted leaves the next one right; what is no optimiser or option is named; empty batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep, gating_gradients


def model_of(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), DynMoE(16, 8, 6, target_k=2.5, max_experts=4, **{"thresholds": "learned", **options}))


def tokens(number: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))


class FailsOnce(torch.optim.SGD):
    def __init__(self, parameters, error: type[BaseException]) -> None:
        super().__init__(parameters, lr=0.1)
        self.error: type[BaseException] | None = error

    def step(self, closure=None):
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().step(closure)


def scaler_of(kind: str) -> torch.amp.GradScaler | None:
    return None if kind == "plain" else torch.amp.GradScaler("cpu", init_scale=16.0)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
@pytest.mark.parametrize("second", [False, True], ids=["first", "second optimiser"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_optimiser_that_fails_leaves_the_next_steps_right(error, second, kind, clip):
    """Against a model of the same parameters whose first steps were never tried."""
    model, x = model_of(), tokens()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    others = [p for name, p in model.named_parameters() if ".router." not in name]
    optimizers = [torch.optim.SGD(others, 0.1), FailsOnce(routers, error)] if second else [FailsOnce(model.parameters(), error)]
    step = HyperStep(model, *optimizers, accumulation_steps=2, max_grad_norm=clip, scaler=scaler_of(kind))
    step(lambda: model(x).square().mean())
    with pytest.raises(error):
        step(lambda: model(x).square().mean())
    assert all(parameter.grad is None for parameter in model.parameters())
    fresh = copy.deepcopy(model)
    again = HyperStep(fresh, torch.optim.SGD(fresh.parameters(), 0.1), accumulation_steps=2, max_grad_norm=clip)
    for one, its in ((model, step), (fresh, again)):
        assert [its(lambda one=one: one(x).square().mean()).stepped for _ in range(4)] == [False, True, False, True]
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_interrupted_batch_leaves_no_hook_and_no_gradient():
    model, x = model_of(), tokens()
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1))

    def interrupted() -> torch.Tensor:
        loss = model(x).square().mean()
        loss.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt))
        return loss

    with pytest.raises(KeyboardInterrupt):
        step(interrupted)
    assert "_tinyonn_capture" not in vars(model[1])
    assert not model[1]._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["surprise", "sdl", "both"])
@pytest.mark.parametrize("number", [0, 5], ids=["no token", "padding alone"])
def test_a_batch_without_a_token_that_counts_teaches_nothing(kind, number):
    model, x = model_of(gating_loss=kind), tokens(number)
    with gating_gradients(model, token_mask=torch.zeros(number, dtype=torch.bool)) as gating:
        (model(x).sum() * 0).backward()
    assert gating.loss == 0
    for parameter in model[1].router.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        (lambda p: [torch.optim.SGD(p, 0.1)], "optimizer must be a torch.optim.Optimizer, got list"),
        (lambda p: torch.optim.LBFGS(p), "optimizer must step without a closure, got LBFGS"),
    ],
    ids=["none", "list", "closure"],
)
def test_what_is_no_optimiser_is_named(make, message):
    model = model_of()
    with pytest.raises(TypeError, match=message):
        HyperStep(model, make(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 1.5}, "accumulation_steps must be an int, got float"),
        ({"accumulation_steps": True}, "accumulation_steps must be an int, got bool"),
        ({"gating_weight": "1"}, "gating_weight must be a number, got str"),
        ({"temperature": "1"}, "temperature must be a number, got str"),
        ({"w_ce": True}, "w_ce must be a number, got bool"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be a number, got str"),
    ],
    ids=str,
)
def test_options_of_another_type_are_named(options, message):
    model = model_of()
    with pytest.raises(TypeError, match=message):
        HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), **options)


def test_modules_are_found_once_and_again_when_they_change(monkeypatch):
    """Every walk over a model goes through named_modules. A layer that is added or replaced learns in the next step."""
    model, x, walks = model_of(), tokens(), []
    original = nn.Module.named_modules

    def counted(module, *args, **options):
        walks.append(module)
        return original(module, *args, **options)

    parameters = [*model.parameters(), *(added := DynMoE(16, 8, 4, gating_loss="surprise")).parameters()]
    step = HyperStep(model, torch.optim.SGD(parameters, 0.1))
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    for _ in range(2):
        step(lambda: model(x).square().mean())
    assert not [module for module in walks if module is model]
    model.append(added)
    fresh = copy.deepcopy(model)
    with gating_gradients(fresh) as gating:
        fresh(x).square().mean().backward()
    result = step(lambda: model(x).square().mean())
    torch.testing.assert_close(result.gating_loss, gating.loss)
    wanted = fresh[2].router.prototypes
    torch.testing.assert_close(added.router.prototypes, wanted - 0.1 * wanted.grad)
    assert len([module for module in walks if module is model]) == 1
    del model[-1], model[1]
    with pytest.raises(TypeError, match=r"model contains no tinyonn\.nn\.DynMoE or DynSMHA layer"):
        step(lambda: model(x).square().mean())


def test_a_model_that_is_assigned_later_learns():
    """Against the same model trained by itself; the first model stays as it is."""
    first, second, x = model_of(), model_of(), tokens()
    with torch.no_grad():
        second[1].router.prototypes += 0.1
    parts = {"first": copy.deepcopy(first), "alone": copy.deepcopy(second)}
    step = HyperStep(first, torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1))
    step.model = second
    got = [step(lambda: second(x).square().mean()).gating_loss for _ in range(2)]
    alone = parts["alone"]
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for loss in got:
        with gating_gradients(alone) as gating:
            alone(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(loss, gating.loss)
    for model, wanted in ((second, alone), (first, parts["first"])):
        for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_model_without_a_mixture_is_refused_when_it_is_assigned_later():
    model, x = model_of(), tokens()
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1))
    step.model = nn.Linear(16, 16)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"model contains no tinyonn\.nn\.DynMoE or DynSMHA layer \(got Linear\)"):
            step(lambda: step.model(x).square().mean())
    step.model = model
    assert step(lambda: model(x).square().mean()).gating_loss > 0


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gating_weight", float("nan"), ValueError, "gating_weight must be finite, got nan"),
        ("gating_weight", -1.0, ValueError, "gating_weight must be at least 0, got -1.0"),
        ("max_grad_norm", 0.0, ValueError, "max_grad_norm must be above 0, got 0.0"),
        ("accumulation_steps", 0, ValueError, "accumulation_steps must be"),
        ("surprise_loss", 0, TypeError, "surprise_loss must be a SurpriseLoss or a mapping of its numbers, got int"),
    ],
)
def test_options_that_are_assigned_later_are_checked(name, value, error, message):
    model, x = model_of(), tokens()
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=1.0)
    step(lambda: model(x).square().mean())
    before, good = copy.deepcopy(model.state_dict()), getattr(step, name)
    setattr(step, name, value)
    with pytest.raises(error, match=message):
        step(lambda: model(x).square().mean())
    for key, wanted in before.items():
        assert torch.equal(model.state_dict()[key], wanted), key
    setattr(step, name, good)
    assert step(lambda: model(x).square().mean()).stepped


def test_fewer_accumulated_batches_take_effect_at_once():
    model, x = model_of(), tokens()
    step = HyperStep(model, torch.optim.SGD(model.parameters(), 0.1), accumulation_steps=4)
    assert not any(step(lambda: model(x).square().mean()).stepped for _ in range(3))
    step.accumulation_steps = 2
    assert [step(lambda: model(x).square().mean()).stepped for _ in range(3)] == [True, False, True]


def test_frozen_routers_of_a_model_that_is_assigned_later_are_told_once():
    first, second, x = model_of(), model_of(), tokens()
    step = HyperStep(first, torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1))
    second[1].router.requires_grad_(False)
    step.model = second
    with pytest.warns(UserWarning, match="no router requires a gradient") as told:
        results = [step(lambda: second(x).square().mean()) for _ in range(2)]
    assert all(result.stepped for result in results)
    assert [warning.filename for warning in told] == [__file__]
