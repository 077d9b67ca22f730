"""A surprise budget as an argument, as what surrounds a model's calls, and where layers are run again in backward."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tinyonn
from tinyonn.nn import DynMoE, carry_surprise_budget, surprise_budget_of


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(16, 8, **{"num_experts": 12, "target_k": 3.0, "max_experts": 12, "routing": "budget", "scale": 20.0, **options})


class Decoder(nn.Module):
    """Two layers that hand nothing on to their mixtures but hidden states."""

    def __init__(self, *, recompute: bool | None = None, carry: bool = True, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), mixture(**options)) for _ in range(2))
        self.recompute, self.carry = recompute, carry

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            called = carry_surprise_budget(layer) if self.carry else layer
            x = x + (layer(x) if self.recompute is None else checkpoint(called, x, use_reentrant=self.recompute))
        return x

    def mean_k(self) -> float:
        found = sum(layer[1].statistics()["mean_k"] for layer in self.layers) / 2
        for layer in self.layers:
            layer[1].reset_statistics()
        return found


class WithArgument(Decoder):
    """The same, where each mixture is given the budget in its call."""

    def forward(self, x: Tensor, budget: Tensor | float | None = None) -> Tensor:
        for norm, moe in self.layers:
            x = x + moe(norm(x), surprise_budget=budget)
        return x


BUDGETS = {
    "number": 0.8,
    "0-d": torch.tensor(0.8),
    "a token": torch.linspace(0.05, 1, 40).view(2, 20),
    "a row": torch.tensor([[0.1], [0.9]]),
    "a place": torch.linspace(0.05, 1, 20).view(1, 20),
}


@pytest.mark.parametrize("kind", BUDGETS)
def test_what_surrounds_a_model_is_the_argument_of_its_mixtures(kind):
    model, other, x = Decoder(), WithArgument(), tokens(2, 20, 16)
    with surprise_budget_of(model, BUDGETS[kind]):
        found = model(x)
    assert torch.equal(found, other(x, BUDGETS[kind]))
    assert not torch.equal(found, model(x))
    assert torch.equal(model(x), other(x))  # nothing is left of it


def test_a_larger_budget_activates_more_experts():
    model, x = Decoder(), tokens(2, 20, 16)
    counts = []
    for budget in (0.1, 0.5, 0.9, 1.0):
        with surprise_budget_of(model, budget):
            model(x)
        counts.append(model.mean_k())
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2] < counts[3] == 12


def test_each_row_and_token_has_its_own():
    module, x = mixture(), tokens(3, 20, 16)
    x[1] = x[2] = x[0]
    with surprise_budget_of(module, torch.tensor([[0.1], [0.5], [1.0]])):
        out = module(x)
    for row, budget in enumerate((0.1, 0.5, 1.0)):
        torch.testing.assert_close(out[row], module(x[row], surprise_budget=budget))


def test_the_inner_one_goes_before_the_outer_and_an_argument_before_both():
    model, x = Decoder(), tokens(2, 20, 16)
    one = model.layers[0][1]

    def mean_of(module: DynMoE, **options) -> float:
        module.reset_statistics()
        module(x, **options)
        return module.statistics()["mean_k"]

    wanted = {budget: mean_of(one, surprise_budget=budget) for budget in (0.2, 0.5, 0.7, 0.9)}
    assert len(set(wanted.values())) == 4
    with surprise_budget_of(model, 0.2):
        with surprise_budget_of(one, 0.9):
            assert mean_of(one) == wanted[0.9]
            assert mean_of(one, surprise_budget=0.7) == wanted[0.7]
        assert mean_of(one) == wanted[0.2]
    assert mean_of(one) == wanted[0.5]  # the module's own


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(error):
    model, x = Decoder(), tokens(2, 20, 16)
    expected = model(x)

    def fail(*_: object) -> None:
        raise error

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error), surprise_budget_of(model, 0.9):
        model(x)
    handle.remove()
    assert torch.equal(model(x), expected)


def test_threads_do_not_mix():
    model, x = Decoder(), tokens(2, 20, 16)
    expected = {}
    for budget in (0.2, 0.9):
        with surprise_budget_of(model, budget):
            expected[budget] = model(x)
    together, found = threading.Barrier(3, timeout=30), {}

    def run(budget: float) -> None:
        with surprise_budget_of(model, budget):
            together.wait()
            found[budget] = model(x)
            together.wait()

    threads = [threading.Thread(target=run, args=(budget,)) for budget in (0.2, 0.9)]
    for thread in threads:
        thread.start()
    together.wait()
    outside = model(x)
    together.wait()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[budget], expected[budget]) for budget in expected)
    assert torch.equal(outside, model(x))
    assert not torch.equal(outside, expected[0.2])


def test_a_copy_and_another_model_are_not_meant():
    model, x = Decoder(), tokens(2, 20, 16)
    expected = model(x)
    with surprise_budget_of(model, 0.9):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), Decoder()):
            assert torch.equal(twin(x), expected)
        assert not torch.equal(model(x), expected)


def gradients(model: Decoder, x: Tensor, budget: float) -> list[Tensor]:
    model.zero_grad()
    with surprise_budget_of(model, budget):
        out = model(x.clone().requires_grad_())
    out.square().sum().backward()  # after the block
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_backward_sees_the_budget_of_forward(reentrant):
    x = tokens(2, 20, 16)
    wanted = gradients(Decoder(), x, 0.9)
    for found, expected in zip(gradients(Decoder(recompute=reentrant), x, 0.9), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    forgotten = gradients(Decoder(recompute=reentrant, carry=False), x, 0.9)
    assert not all(torch.allclose(found, expected) for found, expected in zip(forgotten, wanted, strict=True))


def test_two_calls_are_each_run_again_with_their_own():
    x = tokens(2, 20, 16)
    grads = []
    for recompute in (None, False):
        model = Decoder(recompute=recompute)
        total = torch.zeros(())
        for budget in (0.9, 0.2):
            with surprise_budget_of(model, budget):
                total = total + model(x).square().sum()
        with surprise_budget_of(model, 0.6):  # of no call
            (total + model(x).sum() * 0).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_carried_holds_in_another_thread():
    model, x, found = Decoder(), tokens(2, 20, 16), []
    with surprise_budget_of(model, 0.9):
        expected = model(x)
        carried = carry_surprise_budget(model)
    thread = threading.Thread(target=lambda: found.append(carried(x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_the_router_learns_with_the_budget_of_the_call():
    module, x = mixture(gating_loss="sdl"), tokens(30, 16)
    losses = []
    for budget in (0.2, 0.9):
        with module.capturing() as visits, surprise_budget_of(module, budget):
            module(x).square().sum().backward()
        losses.append(module.gating_loss(visits[0]))
        module_count = module.route(x, budget).count.mean()
        assert visits[0].routing.count.mean() == module_count
        losses[-1] -= (module_count - 3.0).abs().detach()
    torch.testing.assert_close(losses[0], losses[1])  # the number of experts is all that tells them apart


@pytest.mark.parametrize("combine", ["softmax", "gated", "uniform", "unit"])
def test_weights_are_those_asked_for(combine):
    module, x = mixture(combine=combine), tokens(30, 16)
    found = module.route(x, 0.6)
    used = found.top_k_index < 12
    assert len(used.sum(-1).unique()) > 2
    total = used.sum(-1).float() if combine == "unit" else torch.ones(30)
    torch.testing.assert_close(found.top_k_weights.sum(-1), total)
    if combine in ("uniform", "unit"):
        assert all(len(weights[mask].unique()) == 1 for weights, mask in zip(found.top_k_weights, used, strict=True))


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_it_compiles(whole):
    model, expected, x = Decoder(), Decoder(), tokens(2, 20, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager") if whole else model
    for layer in () if whole else model.layers:
        layer.compile(fullgraph=True, backend="eager")
    for budget in (0.2, 0.9, BUDGETS["a token"]):
        with surprise_budget_of(model, budget), surprise_budget_of(expected, budget):
            torch.testing.assert_close(compiled(x), expected(x))
    torch.testing.assert_close(compiled(x), expected(x))


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0.0, ValueError, "surprise_budget must be above 0 and at most 1, got 0.0"),
        (1.01, ValueError, "surprise_budget must be above 0 and at most 1, got 1.01"),
        (float("nan"), ValueError, "surprise_budget must be above 0 and at most 1, got nan"),
        (torch.tensor([[0.5], [1.5]]), ValueError, "surprise_budget must be above 0 and at most 1, got 1.5"),
        (torch.tensor([[0.5], [float("nan")]]), ValueError, "surprise_budget must be above 0 and at most 1, got nan"),
        (torch.ones(2, 20, dtype=torch.long), TypeError, "surprise_budget must be of floating point, got torch.int64"),
        (True, TypeError, "surprise_budget must be a number or a tensor, got bool"),
        ("0.5", TypeError, "surprise_budget must be a number or a tensor, got str"),
        (torch.full((2, 19), 0.5), ValueError, r"must be a number or of shape \(2, 20\), where a size may be 1, got \(2, 19\)"),
        (torch.full((20,), 0.5), ValueError, r"must be a number or of shape \(2, 20\), where a size may be 1, got \(20,\)"),
        (torch.full((40,), 0.5), ValueError, r"must be a number or of shape \(2, 20\), where a size may be 1, got \(40,\)"),
    ],
    ids=["0", "above 1", "NaN", "a row above 1", "a row of NaN", "integers", "bool", "str", "too short", "of places alone", "flat"],
)
def test_what_is_no_budget_is_named(budget, error, message):
    model, x = Decoder(), tokens(2, 20, 16)
    with pytest.raises(error, match=message):
        model.layers[0][1](x, surprise_budget=budget)
    with pytest.raises(error, match=message), surprise_budget_of(model, budget):
        model(x)
    with tinyonn.debug():
        assert torch.equal(model(x), Decoder()(x))  # and nothing is left of it


def test_a_budget_without_use_is_named():
    module, x = mixture(routing="threshold", scale=1.0), tokens(2, 20, 16)
    with pytest.raises(ValueError, match="surprise_budget must be left out unless routing='budget', got one with routing='threshold'"):
        module(x, surprise_budget=0.5)
    with pytest.raises(ValueError, match=r"surprise_budget must be left out unless routing='budget', got 0\.5 with routing='threshold'"):
        mixture(routing="threshold", scale=1.0, surprise_budget=0.5)
    for model in (module, nn.Linear(2, 2)):
        with (
            pytest.raises(ValueError, match=f"must go to mixtures with routing='budget', got {type(model).__name__}, where none"),
            surprise_budget_of(model, 0.5),
        ):
            pass
