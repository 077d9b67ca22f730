"""Thresholds as running quantiles, and the price that holds the mean number of experts, through a user's own loop."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinyonn.nn import DynMoE, ThresholdRouter, token_mask_of
from tinyonn.train import HyperStep

E, F, K = 8, 16, 2.0
QUANTILE = {"thresholds": "quantile", "form": "linear", "combine": "sigmoid", "gating_loss": "none", "level": 0.0, "demand": 0.0}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(F, 8, E, **{"target_k": K, "max_experts": 6, **QUANTILE, **options})


def train(module: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward; no parameter moves."""
    module(x).square().mean().backward()


def scores_of(module: DynMoE, x: torch.Tensor) -> np.ndarray:
    """(N, E), in float64 by hand."""
    wide, prototypes = x.reshape(-1, F).double().numpy(), module.router.prototypes.detach().double().numpy()
    if module.router.form == "linear":
        return wide / np.sqrt((wide**2).mean(1, keepdims=True)) @ prototypes.T
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)) @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T


def upper(scores: np.ndarray, number: float) -> np.ndarray:
    """(E,), the score that `number` tokens exceed: halfway between two of them if it is whole."""
    ordered = -np.sort(-scores, axis=0)
    place = min(max(number - 0.5, 0), len(scores) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("form", ["linear", "sigmoid_cosine"])
def test_thresholds_are_the_mean_quantiles_of_the_batches(form):
    module = mixture(form=form)
    batches = [tokens(40, F, seed=seed) + 0.5 * tokens(F, seed=seed + 9) for seed in range(3)]
    for x in batches:
        train(module, x)
    wanted = [upper(scores_of(module, x), 40 * K / E) for x in batches]
    # The third batch is recorded, and has no effect before the next forward in training.
    np.testing.assert_allclose(module.router.thresholds, np.mean(wanted[:2], 0), rtol=1e-5, atol=1e-6)
    module.eval()(batches[0])
    np.testing.assert_allclose(module.router.thresholds, np.mean(wanted[:2], 0), rtol=1e-5, atol=1e-6)
    module.train()(batches[0])
    np.testing.assert_allclose(module.router.thresholds, np.mean(wanted, 0), rtol=1e-5, atol=1e-6)


def test_a_running_mean_has_a_weight_of_a_twentieth_at_last():
    module, x = mixture(), tokens(40, F)
    for _ in range(60):
        train(module, x)
    module(x)
    before, other = module.router.thresholds.double().numpy(), 3 + tokens(40, F, seed=1)
    train(module, other)
    module(other)
    # What two forwards before one backward recorded counts as one batch.
    both = (upper(scores_of(module, x), 10) + upper(scores_of(module, other), 10)) / 2
    np.testing.assert_allclose(module.router.thresholds, before + 0.05 * (both - before), rtol=1e-4, atol=1e-5)


def test_the_price_moves_by_a_fifth_of_the_deviation():
    module, x = mixture(), tokens(60, F)
    train(module, x)
    train(module, x)
    scores, router = scores_of(module, x), module.router
    realised = np.clip((scores - router.thresholds.numpy() - float(router.price) > 0).sum(1), 1, 6).mean()
    n = 60 * K / E
    spread = (upper(scores, n) - upper(scores, 2 * n)).mean() / math.log(2)
    price = float(router.price)
    module(x)
    assert realised != K
    assert float(router.price) - price == pytest.approx(0.2 * spread * (realised / K - 1), rel=1e-4)
    assert float(router.spread) == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("door", ["argument", "context", "step"])
def test_only_tokens_that_count_and_live_experts_are_measured(door):
    module, x = mixture(), tokens(2, 30, F)
    module.router.expert_mask[5:] = False
    if door != "step":  # a step would carry it into the experts
        x[0, 3] = math.nan
    mask = torch.arange(30) < torch.tensor([[30], [12]])
    start = module.router.thresholds.clone()
    step = HyperStep(module, torch.optim.SGD(module.parameters(), 0.0))
    for _ in range(2):
        if door == "argument":
            module(x, token_mask=mask).nan_to_num().square().mean().backward()
        elif door == "context":
            with token_mask_of(module, mask):
                module(x).nan_to_num().square().mean().backward()
        else:
            step(lambda: module(x).nan_to_num().square().mean(), token_mask=mask)
    seen = x[mask]
    wanted = upper(scores_of(module, seen[~seen.isnan().any(-1)]), (42 if door == "step" else 41) * K / 5)
    np.testing.assert_allclose(module.router.thresholds[:5], wanted[:5], rtol=1e-5, atol=1e-6)
    assert torch.equal(module.router.thresholds[5:], start[5:])


def test_a_batch_of_padding_and_no_tokens_change_nothing():
    module, x = mixture(), tokens(30, F)
    start = {name: buffer.clone() for name, buffer in module.router.named_buffers()}
    for _ in range(2):
        module(x, token_mask=torch.zeros(30, dtype=torch.bool)).square().mean().backward()
        module(x[:0]).sum().backward()
    for name, buffer in module.router.named_buffers():
        assert torch.equal(buffer, start[name]) or name == "era", name


def test_without_a_backward_and_in_evaluation_thresholds_stay():
    module, x = mixture(), tokens(30, F)
    start = module.router.thresholds.clone()
    with torch.no_grad():
        for _ in range(3):
            module(x)
    module.eval()
    for _ in range(3):
        train(module, x)
    assert torch.equal(module.router.thresholds, start)


class Twice(nn.Module):
    """One mixture, used by two layers."""

    def __init__(self, reentrant: bool | None, compiled: bool, **options) -> None:
        super().__init__()
        self.moe, self.reentrant = mixture(**options), reentrant
        self.call = torch.compile(self.moe, backend="aot_eager", fullgraph=True) if compiled else self.moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            out = self.call(x) if self.reentrant is None else checkpoint(self.call, x, use_reentrant=self.reentrant)
            x = x + out
        return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [True, False, "option"], ids=["reentrant", "non-reentrant", "option"])
def test_a_layer_that_backward_runs_again_chooses_the_same_experts(reentrant, compiled):
    """Three steps with checkpointing equal three without: parameters, thresholds and price."""
    plain = Twice(None, False)
    other = Twice(None, compiled, checkpoint=True) if reentrant == "option" else Twice(reentrant, compiled)
    for model in (plain, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for number in range(3):
            x = tokens(50, F, seed=number).requires_grad_()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert int(plain.moe.router.updates) == 2
    wanted = plain.moe.state_dict()
    for name, value in other.moe.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


HELD = [
    {"combine": "sigmoid"}, {"combine": "relu"}, {"combine": "softmax"}, {"form": "sigmoid_cosine"}, {"level": 0.7},
    {"thresholds": "balanced"}, {"thresholds": "balanced", "level": 0.7}, {"thresholds": "balanced", "form": "sigmoid_cosine"},
    {"thresholds": None, "form": None, "combine": None, "gating_loss": None, "level": None, "demand": None}, {"demand": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", HELD, ids=str)
def test_the_mean_number_of_experts_is_held_without_tuning(options):
    """Tokens of unequal topics, prototypes that grow: 3 % at the end of training, and in evaluation afterwards."""
    module = mixture(**options)
    generator = torch.Generator().manual_seed(0)
    topics = 2 * torch.randn(6, F, generator=generator)

    def batch(number: int) -> torch.Tensor:
        kind = torch.randint(6, (number,), generator=generator) % torch.randint(1, 7, (number,), generator=generator)
        return topics[kind] + torch.randn(number, F, generator=generator)

    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for number in range(150):
        x = batch(400)
        (module(x) - x.sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 99:
            module.reset_statistics()
    found = module.statistics()
    assert found["mean_k"] == pytest.approx(K, rel=0.03)
    assert found["dead_experts"] == 0
    module.eval().reset_statistics()
    module(batch(8000))
    assert module.statistics()["mean_k"] == pytest.approx(K, rel=0.03)


def test_balanced_thresholds_take_equal_steps_towards_equal_load():
    module, x = mixture(thresholds="balanced"), tokens(60, F)
    train(module, x)
    router, before = module.router, module.router.thresholds.clone()
    index = module.route(x).top_k_index
    load = torch.bincount(index.flatten(), minlength=E + 1)[:E].double()
    module(x)
    scores = scores_of(module, x)
    spread = (upper(scores, 60 * K / E) - upper(scores, 120 * K / E)).mean() / math.log(2)
    towards = np.sign((load - load.mean()).numpy())
    assert len(set(towards)) > 1
    moved = towards != 0
    wanted = 0.01 * spread * np.where(moved, towards - towards.sum() / moved.sum(), 0)
    np.testing.assert_allclose(router.thresholds - before, wanted, rtol=1e-3, atol=1e-6)


def test_steps_towards_equal_load_reach_it():
    module, x = mixture(thresholds="balanced"), tokens(400, F) + 0.5 * tokens(F, seed=5)
    module.eval()(x)
    before = module.statistics()["counts"].double()
    module.train()
    for _ in range(150):
        train(module, x)
    module.eval().reset_statistics()
    module(x)
    after = module.statistics()["counts"].double()
    assert (after / after.mean() - 1).abs().max() < 0.15 < 0.5 < (before / before.mean() - 1).abs().max()


def test_a_level_makes_numbers_of_experts_alike():
    x = tokens(2000, F)
    spread = []
    for level in (0.0, 0.5, 0.9, 1.0):
        module = mixture(level=level)
        assert module.router.calibrate(x) == pytest.approx(K, rel=0.02)
        count = module.route(x).count
        assert count.mean().item() == pytest.approx(K, rel=0.02)
        spread.append(count.std().item())
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] == 0 < 0.3 < spread[0]


@pytest.mark.parametrize(("kind", "form", "least"), [
    ("quantile", "linear", 0.85), ("balanced", "linear", 0.1), ("balanced", "sigmoid_cosine", 0.1),
])  # fmt: skip
def test_no_expert_starves_and_a_starved_one_comes_back(kind, form, least):
    module = mixture(thresholds=kind, form=form)
    with torch.no_grad():
        module.router.thresholds[:4] = 50.0
    x = tokens(400, F)
    module(x)
    assert module.statistics()["dead_experts"] == 4
    for _ in range(2):
        train(module, x)
    module.reset_statistics()
    module.eval()(x)
    counts = module.statistics()["counts"].double()
    assert counts.min() > least * 400 * K / E


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_ended():
    def steps(module: DynMoE, numbers: range) -> DynMoE:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for number in numbers:
            train(module, tokens(50, F, seed=number))
            optimizer.step()
            optimizer.zero_grad()
        return module

    whole, first = steps(mixture(), range(4)), steps(mixture(), range(2))
    second = mixture()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, range(2, 4))
    for name, value in second.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert torch.equal(copy.deepcopy(whole)(tokens(5, F)), whole(tokens(5, F)))


def test_calibration_sets_quantiles_and_price_of_real_tokens():
    module = mixture()
    x = tokens(3000, F) + 2 * tokens(F, seed=3)
    assert module.router.calibrate(x) == pytest.approx(K, rel=0.01)
    np.testing.assert_allclose(module.router.thresholds, upper(scores_of(module, x), 3000 * K / E), rtol=1e-4, atol=1e-5)
    counts = module.eval()(x) is not None and module.statistics()["counts"].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.1
    assert module.statistics()["mean_k"] == pytest.approx(K, rel=0.01)


def test_half_precision_leaves_running_thresholds_in_float32():
    module = mixture().bfloat16()
    assert {module.router.thresholds.dtype, module.router.price.dtype, module.router.pending.dtype} == {torch.float32}
    assert module.router.prototypes.dtype == torch.bfloat16
    x = tokens(400, F).bfloat16()
    train(module, x)
    module(x)
    np.testing.assert_allclose(module.router.thresholds, upper(scores_of(module, x), 400 * K / E), rtol=1e-3, atol=1e-3)
    assert mixture().double().router.price.dtype == torch.float64


def test_a_router_alone_is_trained_by_its_own_methods():
    torch.manual_seed(0)
    router = ThresholdRouter(F, E, K, thresholds="quantile", form="linear", combine="sigmoid")
    for _ in range(2):
        router.apply_recorded()
        x = tokens(40, F)
        router.record(x, router(x)).top_k_weights.sum().backward()
    assert int(router.updates) == 1
    assert [name for name, _ in router.named_parameters()] == ["prototypes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": "running"}, "thresholds must be one of learned, quantile, balanced, got 'running'"),
        ({"form": "cosine"}, "form must be linear or sigmoid_cosine with thresholds='quantile', got cosine"),
        ({"routing": "budget"}, "thresholds must not be 'quantile' with routing='budget'"),
        ({"routing": "budget", "thresholds": "learned"}, "combine must not be 'sigmoid' with routing='budget'"),
        ({"routing": "budget", "combine": "softmax"}, "thresholds must not be 'quantile' with routing='budget'"),
        ({"routing": "budget", "combine": "softmax", "thresholds": "balanced"}, "thresholds must not be 'balanced' with routing='budget'"),
        ({"scale": 4.0}, "scale must be 1 unless form='sigmoid_cosine', got 4 with form='linear'"),
        ({"form": "sigmoid_cosine", "level": 0.5}, "level must be 0 unless form='linear', got 0.5 with form='sigmoid_cosine'"),
        ({"level": 2}, "level must be at least 0 and at most 1, got 2"),
        ({"gating_loss": "off"}, "gating_loss must be one of surprise, sdl, both, none, got 'off'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_without_a_gating_loss_the_main_loss_alone_trains_the_router():
    module, x = mixture(), tokens(30, F)
    (module(x) - x).square().mean().backward()
    wanted = module.router.prototypes.grad.clone()
    assert wanted.norm() > 0
    other = mixture()
    step = HyperStep(other, torch.optim.SGD(other.parameters(), 1.0))
    result = step(lambda: (other(x) - x).square().mean())
    torch.testing.assert_close(other.router.prototypes, module.router.prototypes - wanted)
    assert result.gating_loss == 0


class TwoInFlight(nn.Module):
    """A mixture whose whole layer runs again in backward, or does not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.moe, self.again = mixture(), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.moe, x, use_reentrant=False) if self.again else self.moe(x)


@pytest.mark.parametrize("other", [False, True], ids=["of one model", "of two models"])
def test_a_forward_that_waits_for_its_backward_chooses_the_same_experts_again(other):
    """One forward, one backward by turns, as pipelines do it; or a second model that learns between the two."""
    gradients = []
    for again in (False, True):
        model, second = TwoInFlight(again), mixture()
        for seed in range(3):  # thresholds are on the move
            train(model, tokens(64, F, seed=seed) + 1)
        first = (tokens(64, F, seed=5) - 1).requires_grad_()
        waiting = model(first).square().mean()
        if other:
            train(second, tokens(64, F, seed=6))
        else:
            train(model, tokens(64, F, seed=6))
        model(tokens(64, F, seed=7) + 2)  # would move thresholds
        waiting.backward()
        gradients.append(first.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model], ids=["copy", "itself"])
def test_thresholds_move_again_once_no_forward_waits(copied):
    model = mixture(thresholds="balanced")
    train(model, tokens(64, F))
    dropped = model(tokens(64, F, seed=1))
    model = copied(model)
    before = model.router.thresholds.clone()
    if copied is not copy.deepcopy:  # which has no graph
        train(model, tokens(64, F, seed=2))
        model(tokens(64, F, seed=3))
        torch.testing.assert_close(model.router.thresholds, before, rtol=0, atol=0)
    del dropped
    train(model, tokens(64, F, seed=4))
    model(tokens(64, F, seed=5))
    assert not torch.equal(model.router.thresholds, before)


def test_a_model_that_is_first_called_in_inference_mode_learns_afterwards(monkeypatch):
    monkeypatch.setattr("tinyonn.nn.running_thresholds._passes", {})  # as in a new process
    with torch.inference_mode():
        mixture()(tokens(8, F))
    model = mixture()
    before = model.router.thresholds.clone()
    for seed in range(3):
        train(model, tokens(64, F, seed=seed))
    assert not torch.equal(model.router.thresholds, before)


def test_balanced_thresholds_let_no_expert_starve_where_a_token_has_no_room_for_more():
    torch.manual_seed(0)
    model = DynMoE(32, 8, num_experts=32, target_k=4, max_experts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(400):
        x = tokens(128, 32, seed=step) + 5
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().reset_statistics()
    model(tokens(8000, 32, seed=-1) + 5)
    statistics = model.statistics()
    assert statistics["dead_experts"] == 0
    assert statistics["mean_k"] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_demand_is_learned_in_half_precision(dtype):
    torch.manual_seed(1)
    model = DynMoE(16, 8, num_experts=8, target_k=2, level=1.0, demand=0.5).to(dtype)
    for seed in range(100):
        x = tokens(256, 16, seed=seed)
        (model(x.to(dtype)).float() * (1 + 5 * (x[:, :1] > 0))).square().mean().backward()
    model.eval()
    x = tokens(4000, 16, seed=-1)
    number = (model.route(x.to(dtype)).top_k_index < 8).sum(-1).float()
    assert number[x[:, 0] > 0].mean() > number[x[:, 0] <= 0].mean() + 0.5
    assert all(buffer.dtype == torch.float32 for buffer in model.router.head.buffers())


def test_thresholds_of_a_frozen_router_stay():
    model = nn.Sequential(nn.Linear(F, F), mixture(demand=0.5))
    model[1].requires_grad_(False)
    before = copy.deepcopy(model[1].state_dict())
    for seed in range(3):
        train(model, tokens(64, F, seed=seed))
    for name, value in model[1].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"thresholds": "balanced"}, {"thresholds": "quantile"}, "was saved with thresholds='balanced', but this one has 'quantile'"),
        ({"thresholds": "quantile"}, {"thresholds": "balanced"}, "was saved with thresholds='quantile', but this one has 'balanced'"),
        ({"demand": 0.5}, {}, "was saved with demand above 0, but this one has demand 0"),
        ({}, {"demand": 0.5}, "was saved with demand 0, but this one has demand above 0"),
    ],
    ids=str,
)
def test_a_state_of_other_options_is_named(saved, own, message):
    with pytest.raises(RuntimeError, match=f"router {message}"):
        mixture(**own).load_state_dict(mixture(**saved).state_dict())


def test_statistics_of_a_model_that_transformers_loads_begin_at_0(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config) -> None:
            super().__init__(config)
            self.moe = mixture()
            self.post_init()

        def _init_weights(self, module) -> None:
            pass

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(x)

    first = Model(transformers.PretrainedConfig())
    first.save_pretrained(tmp_path)
    rubbish = [torch.full((1000,), 7) for _ in range(50)]  # so that new memory is not 0
    del rubbish
    loaded = Model.from_pretrained(tmp_path)
    x = tokens(100, F)
    for model in (first, loaded):
        model.eval()(x)
    found, wanted = loaded.moe.statistics(), first.moe.statistics()
    assert found["counts"].tolist() == wanted["counts"].tolist()
    assert found["mean_k"] == wanted["mean_k"]
    loaded.train()
    train(loaded, x)
    train(loaded, x)
    assert loaded.moe.router.updates == 1
