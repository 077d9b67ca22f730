"""What a mixture and its router cannot take is named: options when they are made, tokens and masks when they come."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn.nn import DynMoE, ThresholdRouter

NAN, INF = math.nan, math.inf


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(**{"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "target_k": 2.0, "max_experts": 4, **options})


def router(**options) -> ThresholdRouter:
    torch.manual_seed(0)
    return ThresholdRouter(**{"hidden_size": 16, "num_experts": 6, "target_k": 2.0, "max_experts": 4, **options})


OF_BOTH = [
    ({"form": "dot"}, ValueError, "form must be one of sigmoid_cosine, cosine, linear, got 'dot'"),
    ({"combine": "sum"}, ValueError, "combine must be one of softmax, gated, uniform, softmax_logits, sigmoid, relu, unit, got 'sum'"),
    ({"scale": 0.0}, ValueError, r"scale must be above 0, got 0\.0"),
    ({"scale": -1}, ValueError, "scale must be above 0, got -1"),
    ({"scale": INF}, ValueError, "scale must be finite, got inf"),
    ({"scale": NAN}, ValueError, "scale must be finite, got nan"),
    ({"scale": 10**400}, ValueError, "scale must be a number that a float holds, got 1000"),
    ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"hidden_size": 16.0}, TypeError, "hidden_size must be an int, got float"),
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
    ({"num_experts": True}, TypeError, "num_experts must be an int, got bool"),
    ({"min_experts": -1}, ValueError, "min_experts must be at least 0, got -1"),
    ({"min_experts": 5}, ValueError, "max_experts must be at least 1 and at least min_experts, got 4 and 5"),
    ({"max_experts": 0, "min_experts": 0}, ValueError, "max_experts must be at least 1 and at least min_experts, got 0 and 0"),
    ({"max_experts": 4.0}, TypeError, "max_experts must be an int, got float"),
    ({"target_k": 5.0}, ValueError, r"target_k must be 1 … 4, got 5\.0"),
    ({"target_k": NAN}, ValueError, "target_k must be finite, got nan"),
    ({"target_k": "3"}, TypeError, "target_k must be a number, got str"),
]
OF_MIXTURES = [
    ({"intermediate_size": 0}, ValueError, "intermediate_size must be at least 1, got 0"),
    ({"intermediate_size": "8"}, TypeError, "intermediate_size must be an int, got str"),
    ({"max_num_experts": 5}, ValueError, "max_num_experts must be at least num_experts 6, got 5"),
    ({"max_num_experts": 8.0}, TypeError, "max_num_experts must be an int, got float"),
    ({"activation": "tanh"}, ValueError, "activation must be one of silu, .*, got 'tanh'"),
    ({"surprise_kind": "up_proj"}, ValueError, "surprise_kind must be one of down_proj, .*, got 'up_proj'"),
    ({"routing": "top-k"}, ValueError, "routing must be one of threshold, budget, got 'top-k'"),
    ({"gating_loss": "balance"}, ValueError, "gating_loss must be one of surprise, sdl, both, none, got 'balance'"),
    ({"dropout": 1.0}, ValueError, r"dropout must be at least 0 and below 1, got 1\.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must be at least 0 and below 1, got -0\.1"),
    ({"dropout": NAN}, ValueError, "dropout must be finite, got nan"),
    ({"gated": "no"}, TypeError, "gated must be True or False, got 'no'"),
    ({"bias": None}, TypeError, "bias must be True or False, got None"),
    ({"checkpoint": 1}, TypeError, "checkpoint must be True or False, got 1"),
    ({"routing": "budget", "surprise_budget": 0.0}, ValueError, r"surprise_budget must be above 0 and at most 1, got 0\.0"),
    ({"routing": "budget", "surprise_budget": 1.01}, ValueError, r"surprise_budget must be above 0 and at most 1, got 1\.01"),
    ({"routing": "budget", "surprise_budget": NAN}, ValueError, "surprise_budget must be finite, got nan"),
    ({"routing": "budget", "surprise_budget": torch.ones(2)}, TypeError, "surprise_budget must be a number, got Tensor"),
    ({"surprise_budget": 0.5}, ValueError, r"surprise_budget must be left out unless routing='budget', got 0\.5"),
    ({"routing": "budget", "min_experts": 2}, ValueError, "min_experts must be 1 with routing='budget', got 2"),
]


def id_of(value: object) -> str:
    return " ".join(f"{name}={str(option)[:40]}" for name, option in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("options", "error", "message"), OF_BOTH + OF_MIXTURES, ids=id_of)
def test_a_mixture_names_bad_options_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        mixture(**options)


@pytest.mark.parametrize(("options", "error", "message"), OF_BOTH, ids=id_of)
def test_a_router_names_bad_options_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        router(**options)


def test_a_router_names_more_live_experts_than_it_has():
    with pytest.raises(ValueError, match="num_live must be 1 … 6, got 7"):
        router(num_live=7)


@pytest.mark.parametrize("budget", [1, 1.0, 1e-9])
def test_the_ends_of_what_is_allowed_are_allowed(budget):
    module = mixture(routing="budget", surprise_budget=budget, dropout=0, min_experts=1, max_experts=6, scale=1)
    module(tokens(10, 16))
    assert module.statistics()["mean_k"] == (6 if budget == 1 else 1)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 15), ()], ids=str)
def test_calibration_names_tokens_that_are_none(shape):
    module = router()
    before = module.thresholds.clone()
    with pytest.raises(ValueError, match=r"hidden_states must be one token at least, of shape \(\.\.\., 16\), got "):
        module.calibrate(torch.zeros(shape))
    assert torch.equal(module.thresholds, before)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_calibration_names_tokens_that_are_not_finite(value):
    module, x = router(), tokens(2, 5, 16)
    before = module.thresholds.clone()
    x[0, 1, 3] = x[1, 4, :] = value
    with pytest.raises(ValueError, match="hidden_states must be finite, got NaN or infinity in 2 of 10 tokens"):
        module.calibrate(x)
    assert torch.equal(module.thresholds, before)


@pytest.mark.parametrize(("target", "live"), [(0.5, 6), (4.5, 6), (3.0, 2)])
def test_calibration_names_a_target_out_of_range(target, live):
    module = router()
    module.expert_mask[live:] = False
    with pytest.raises(ValueError, match=f"target_k must be 1 … {min(4, live)}, got {target}"):
        module.calibrate(tokens(10, 16), target)


@pytest.mark.parametrize("tokens_seen", [5, 200])
@pytest.mark.parametrize("options", [{"thresholds": "balanced", "form": "linear"}, {}], ids=["balanced", "learned"])
def test_calibration_reaches_all_experts(options, tokens_seen):
    module = router(target_k=6.0, max_experts=1000, **options)
    assert module.max_experts == 6  # lists of experts have no more places than there are experts
    assert module.calibrate(tokens(tokens_seen, 16)) == 6
    assert module(tokens(tokens_seen, 16)).count.tolist() == [6] * tokens_seen


@pytest.mark.parametrize("length", [1e30, 1e-30])
def test_calibration_and_routing_mind_no_lengths(length):
    one, other, x = router(), router(), tokens(500, 16)
    assert other.calibrate(x * length) == pytest.approx(one.calibrate(x)) == pytest.approx(2.0, rel=0.05)
    torch.testing.assert_close(other.thresholds, one.thresholds)
    with torch.no_grad():
        other.prototypes.mul_(1 / length)
    assert torch.equal(other(x * length).top_k_index, one(x).top_k_index)


def test_no_live_expert_is_named():
    module, x = mixture(), tokens(10, 16)
    module.router.expert_mask.zero_()
    with pytest.raises(ValueError, match="expert_mask masks out every expert"):
        module.router.calibrate(x)
    with tinyonn.debug(), pytest.raises(ValueError, match="expert_mask masks out every expert"):
        module(x)
    assert (module(x) == 0).all()  # without a look at the device's values, tokens go nowhere


@pytest.mark.parametrize("size", [(9,), (2, 6), (5, 2), (0,), ()], ids=str)
def test_a_token_mask_of_another_shape_is_named(size):
    module = mixture()
    with module.capturing() as visits:
        module(tokens(2, 5, 16)).sum().backward()
        with pytest.raises(ValueError, match=r"token_mask must have the shape of the tokens a mixture is given, \(2, 5\), got "):
            module.gating_loss(visits[0], torch.ones(size, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"token_mask must be a tensor of bool or integers, got torch\.float32"):
            module.gating_loss(visits[0], torch.ones(2, 5))
        assert module.gating_loss(visits[0], torch.ones(2, 5, dtype=torch.bool)) == module.gating_loss(visits[0])


@pytest.mark.parametrize("form", ["sigmoid_cosine", "cosine", "linear"])
def test_calibration_in_half_precision_gives_the_mean_of_what_is_stored(form):
    router = ThresholdRouter(64, 256, 6.0, dtype=torch.bfloat16, form=form, max_experts=64, min_experts=0)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    reached = router.calibrate(x)
    assert reached == pytest.approx(router(x).count.mean().item(), abs=1 / 500)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1.0] * 8, TypeError, "hidden_states must be a tensor, got list"),
        (torch.tensor(1.0), ValueError, r"hidden_states must have shape \(..., 8\), got \(\)"),
        (torch.ones(3, 7), ValueError, r"hidden_states must have shape \(..., 8\), got \(3, 7\)"),
        (torch.ones(3, 8, dtype=torch.int64), TypeError, "hidden_states must be .*, got torch.int64"),
    ],
    ids=["list", "number", "features", "integers"],
)
def test_a_mixture_names_what_are_no_hidden_states(given, error, message):
    with pytest.raises(error, match=message):
        DynMoE(8, 4, 4)(given)


RUNNING = ("balanced", "linear", "softmax_logits", 0.4, 0.25, "none")
LEARNED = ("learned", "sigmoid_cosine", "softmax", 0.0, 0.0, "both")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, RUNNING),
        ({"thresholds": "quantile"}, ("quantile", *RUNNING[1:])),
        ({"combine": "sigmoid"}, ("balanced", "linear", "sigmoid", 0.4, 0.25, "none")),
        ({"gating_loss": "none"}, RUNNING),
        ({"thresholds": "balanced", "gating_loss": "surprise"}, (*RUNNING[:5], "surprise")),
        ({"thresholds": "balanced", "form": "sigmoid_cosine"}, ("balanced", "sigmoid_cosine", "softmax_logits", 0.0, 0.0, "none")),
        ({"thresholds": "learned"}, LEARNED),
        ({"gating_loss": "both"}, LEARNED),
        ({"gating_loss": "surprise"}, (*LEARNED[:5], "surprise")),
        ({"form": "cosine"}, ("learned", "cosine", *LEARNED[2:])),
        ({"form": "sigmoid_cosine"}, LEARNED),
        ({"routing": "budget"}, LEARNED),
    ],
    ids=str,
)
def test_defaults_belong_together(options, wanted):
    """With thresholds="learned", routing by budget, or an option of the earlier rule, the others are those of the earlier rule too."""
    module = mixture(**options)
    router = module.router
    assert (router.thresholds_kind, router.form, router.combine, router.level, router.demand, module.gating_loss_kind) == wanted
