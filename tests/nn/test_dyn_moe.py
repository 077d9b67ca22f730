"""The threshold router and the mixture of tiny experts as modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tinyonn import ops, reference
from tinyonn.nn import DynMoE, ThresholdRouter
from tinyonn.train import HyperStep, capture_surprise


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(32, 8, **{"num_experts": 12, "target_k": 3.0, "max_experts": 6, **options})


@pytest.mark.parametrize(
    ("features", "experts", "target", "lowest", "highest"),
    [(64, 16, 2.0, 1, 8), (64, 64, 4.0, 1, 8), (256, 256, 8.0, 1, 16), (128, 1024, 12.0, 4, 32), (48, 16, 1.0, 1, 4)],
)
@pytest.mark.parametrize("form", ["sigmoid_cosine", "cosine", "linear"])
def test_it_starts_at_the_mean_number_of_experts_asked_for(features, experts, target, lowest, highest, form):
    torch.manual_seed(0)
    router = ThresholdRouter(features, experts, target, form=form, min_experts=lowest, max_experts=highest)
    count = router(tokens(4000, features, seed=1)).count
    assert count.mean().item() == pytest.approx(target, rel=0.1)
    assert count.min() >= lowest
    if lowest < target < highest:
        assert len(count.unique()) > 2


def test_more_than_half_of_the_experts_may_be_asked_for_with_sigmoids():
    torch.manual_seed(0)
    count = ThresholdRouter(32, 8, 6.0)(tokens(4000, 32, seed=1)).count
    assert count.mean().item() == pytest.approx(6, rel=0.1)
    assert len(count.unique()) > 2


def test_more_experts_than_have_a_positive_cosine_are_refused():
    with pytest.raises(ValueError, match=r"target_k must be at most 4\.\d\d here with form='cosine'"):
        ThresholdRouter(32, 8, 6.0, form="cosine")


def test_calibration_fits_tokens_that_share_a_direction():
    torch.manual_seed(0)
    router = ThresholdRouter(64, 32, 4.0)
    x = tokens(2000, 64) + 3 * tokens(64, seed=5)
    before = router(x).count.mean().item()
    reached = router.calibrate(x)
    assert reached == pytest.approx(4.0, rel=0.02)
    assert router(x).count.mean().item() == pytest.approx(reached, rel=0.01)
    assert abs(before - 4) > 2 * abs(reached - 4)


def test_only_live_experts_are_chosen_and_trained():
    module = mixture(num_experts=5, max_num_experts=12)
    module(tokens(200, 32)).square().sum().backward()
    counts = module.statistics()["counts"]
    assert (counts[:5] > 0).all()
    assert (counts[5:] == 0).all()
    for parameter in module.parameters():
        assert (parameter.grad[5:] == 0).all()
        assert (parameter.grad[:5] != 0).any()
    assert module.statistics()["dead_experts"] == 0
    again = mixture(num_experts=12)
    again.load_state_dict(module.state_dict())
    assert again.router.expert_mask.sum() == 5


@pytest.mark.parametrize("shape", [(32,), (7, 32), (2, 5, 32), (0, 32)])
def test_it_takes_the_place_of_an_mlp(shape):
    module, x = mixture(bias=True), tokens(*shape)
    out = nn.Sequential(nn.LayerNorm(32), module)(x)
    assert out.shape == shape
    flat = nn.LayerNorm(32)(x).reshape(-1, 32)
    routing = module.route(flat)
    expected = reference.expert_mlp(
        flat, module.gate_up_proj, module.down_proj, routing.top_k_index, routing.top_k_weights, gate_up_bias=module.gate_up_bias,
        down_bias=module.down_bias,
    )  # fmt: skip
    torch.testing.assert_close(out.reshape(-1, 32).double(), expected, rtol=1e-4, atol=1e-6)


def test_a_larger_budget_activates_more_experts():
    module, x = mixture(routing="budget", scale=20.0, max_experts=12), tokens(3, 40, 32)
    counts = []
    for budget in (0.1, 0.5, 0.9):
        module.reset_statistics()
        module(x, surprise_budget=budget)
        counts.append(module.statistics()["mean_k"])
    assert counts[0] < counts[1] < counts[2]
    each = torch.full((3, 40), 0.1)
    each[1] = 0.9
    flat = x.view(-1, 32)
    low, high = (module.route(flat, budget).count.view(3, 40) for budget in (0.1, 0.9))
    module.reset_statistics()
    module(x, surprise_budget=each)
    assert module.statistics()["mean_k"] == pytest.approx(torch.where(each > 0.5, high, low).mean().item())


@pytest.mark.parametrize("counted", ["nothing ran", "all tokens masked", "all tokens NaN", "reset"])
def test_without_a_counted_token_statistics_are_unknown(counted):
    module, x = mixture(), tokens(50, 32)
    if counted == "all tokens masked":
        module(x, token_mask=torch.zeros(50, dtype=torch.bool))
    elif counted == "all tokens NaN":
        module(x * torch.nan)
    elif counted == "reset":
        module(x)
        assert module.statistics()["dead_experts"] < 12
        module.reset_statistics()
    found = module.statistics()
    assert math.isnan(found["mean_k"])
    assert math.isnan(found["dead_experts"])  # not 12: no token says anything of an expert
    assert found["counts"].tolist() == [0] * 12


def test_statistics_count_tokens():
    module, x = mixture(), tokens(50, 32)
    routing = module.route(x)
    module(x)
    found = module.statistics()
    assert found["mean_k"] == pytest.approx(routing.count.mean().item())
    assert found["counts"].tolist() == torch.bincount(routing.top_k_index.flatten(), minlength=13)[:12].tolist()


@pytest.mark.parametrize("kind", ["down_proj", "expert", "output"])
def test_a_captured_call_knows_its_surprise(kind):
    module, x = mixture(surprise_kind=kind), tokens(20, 32)
    with module.capturing() as visits:
        out = module(x)
        with torch.no_grad():
            module(x)
        with pytest.raises(RuntimeError, match="backward has not reached this call"):
            module.surprise(visits[0])
        cotangent = tokens(20, 32, seed=3)
        out.backward(cotangent)
        assert len(visits) == 1
        found = module.surprise(visits[0])
    routing = module.route(x)
    slots = reference.expert_surprise(
        x, module.gate_up_proj, module.down_proj, routing.top_k_index, routing.top_k_weights, cotangent, kind=kind
    )
    torch.testing.assert_close(found.double(), ops.scatter_surprise(slots, routing.top_k_index, 12), rtol=1e-4, atol=1e-7)
    assert "_tinyonn_capture" not in vars(module)


def test_nothing_is_remembered_after_an_exception_or_outside():
    module = mixture()
    with pytest.raises(ValueError, match="hidden_states must have shape"), module.capturing():
        module(tokens(3, 31))
    assert "_tinyonn_capture" not in vars(module)
    with module.capturing(), pytest.raises(RuntimeError, match="only one context can capture it"), module.capturing():
        pass


@pytest.mark.parametrize("kind", ["surprise", "sdl", "both"])
@pytest.mark.parametrize("routing", ["threshold", "budget"])
def test_the_gating_loss_trains_the_router_alone(kind, routing):
    module, x = mixture(gating_loss=kind, routing=routing), tokens(30, 32)
    mask = torch.arange(30) < 20
    with module.capturing() as visits:
        module(x).square().sum().backward()
    module.zero_grad()
    loss = module.gating_loss(visits[0], mask)
    loss.backward()
    chosen = module.route(x)
    expected = torch.zeros(())
    if kind != "sdl":
        expected = expected + ops.surprise_min_loss(chosen.scores, module.surprise(visits[0]), token_mask=mask)
    if kind != "surprise":
        expected = expected + ops.sparse_diversity_loss(module.router.prototypes, chosen.count[mask], 3.0)
    torch.testing.assert_close(loss, expected)
    for name, parameter in module.named_parameters():
        trained = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert trained == name.startswith("router."), name


def test_a_hundred_checkpointed_steps_in_half_precision():
    """Routing stays outside what is recomputed, so no step sends a token elsewhere; and the gradients are those without."""
    plain = mixture(dtype=torch.bfloat16)
    module = copy.deepcopy(plain)
    module.checkpoint = True
    optimizers = [torch.optim.SGD(x.parameters(), 0.05) for x in (plain, module)]
    for step in range(100):
        x = tokens(64, 32, seed=step).bfloat16()
        for model, optimizer in zip((plain, module), optimizers, strict=True):
            optimizer.zero_grad()
            with model.capturing() as visits:
                (model(x) - x).float().square().mean().backward()
            model.gating_loss(visits[0]).backward()
            optimizer.step()
        if step % 20 == 0:
            for a, b in zip(plain.parameters(), module.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_experts_alone_are_recomputed(monkeypatch):
    module = mixture(checkpoint=True)
    calls = {"route": 0, "execute": 0}
    for name in calls:
        original = getattr(module, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counted)
    module(tokens(20, 32)).sum().backward()
    assert calls == {"route": 1, "execute": 2}


def test_it_compiles():
    module, x = mixture(), tokens(20, 32)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


def test_a_compiled_mixture_hands_out_its_surprise():
    module, x = mixture().eval(), tokens(20, 32)  # in training the second run would follow the first's thresholds
    compiled, found = torch.compile(module, fullgraph=True, backend="aot_eager"), []
    compiled(x)
    for run in (module, compiled):
        with capture_surprise(module) as surprise:
            run(x).square().sum().backward()
        found.append(surprise[""])
    torch.testing.assert_close(found[1], found[0])


def test_a_budget_of_everything_leaves_out_experts_that_are_not_live():
    module = mixture(num_experts=3, max_num_experts=9, target_k=1.5, routing="budget", surprise_budget=1.0, gating_loss="both")
    with module.capturing() as visits:
        module(tokens(500, 32)).square().sum().backward()
    assert (module.statistics()["counts"][3:] == 0).all()
    assert module.gating_loss(visits[0]).isfinite()


@pytest.mark.parametrize("kind", ["surprise", "sdl", "both"])
def test_padding_alone_teaches_nothing(kind):
    module = mixture(gating_loss=kind)
    with module.capturing() as visits:
        module(tokens(5, 32)).square().sum().backward()
    assert module.gating_loss(visits[0], torch.zeros(5, dtype=torch.bool)) == 0


def test_it_runs_under_autocast_behind_a_linear_layer():
    model = nn.Sequential(nn.Linear(32, 32), mixture(bias=True))
    x = tokens(20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(TypeError, match=r"hidden_states must be torch\.float32 like the experts, or come under autocast"):
        model[1](x.bfloat16())


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"target_k": 16.0}, 40),
        ({"target_k": 8.0}, 32),
        ({"target_k": 16.0, "thresholds": "learned"}, 32),
        ({"target_k": 2.0}, 8),
        ({"num_experts": 5}, 5),
        ({"num_experts": 1}, 1),
        ({"routing": "budget", "target_k": 2.0}, 40),
        ({"target_k": 2.0, "max_experts": 3}, 3),
    ],
    ids=str,
)
def test_slots_fit_the_target_or_the_budget(options, slots):
    module = DynMoE(16, 4, **{"num_experts": 40, **options})
    assert module.router.max_experts == slots
    assert module.route(tokens(6, 16)).top_k_index.shape == (6, slots)


def test_by_default_training_keeps_the_number_of_experts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), DynMoE(32, 8, num_experts=32, target_k=3.0), nn.Linear(32, 16))
    step = HyperStep(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    for _ in range(40):
        x = torch.randn(64, 16)
        step(lambda x=x: (model(x) - x.sin()).square().mean())
    model[1].reset_statistics()
    model(torch.randn(256, 16))
    assert model[1].statistics()["mean_k"] == pytest.approx(3, abs=0.7)


def test_what_it_prints_says_how_it_routes():
    assert "routing=threshold, gating_loss=none, activation=silu" in repr(mixture())
    assert "gating_loss=both" in repr(mixture(thresholds="learned"))
    by_budget = repr(mixture(routing="budget", surprise_budget=0.3))
    assert "intermediate_size=8, num_experts=12, routing=budget, surprise_budget=0.3" in by_budget
