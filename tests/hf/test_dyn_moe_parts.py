"""What a converted MLP needs of the mixture: experts that add up, one bias for all of them, dropout; and neurons in equal groups."""

from __future__ import annotations

import itertools

import pytest
import torch

from tinyonn.hf.dyn_moe.partition import balanced_assignment, coactive_neurons, neurons_in_order
from tinyonn.nn import DynMoE


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(32, 8, 12, **{"target_k": 3.0, "max_experts": 6, "combine": "unit", "dtype": torch.float64, **options})


def test_unit_weights_add_active_experts_up():
    module, x = mixture(max_experts=9), tokens(40, 32)
    routing = module.route(x)
    active = (routing.scores > 0) | (routing.scores == routing.scores.max(-1, keepdim=True).values)
    assert len(active.sum(-1).unique()) > 2
    assert (active.sum(-1) <= 9).all()
    expected = torch.zeros_like(x)
    for expert in range(12):
        gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
        expected += active[:, expert, None] * ((gate * gate.sigmoid() * up) @ module.down_proj[expert].T)
    torch.testing.assert_close(module(x), expected)


def test_the_gradient_of_a_unit_weight_is_that_of_its_score():
    module, x = mixture(), tokens(40, 32)
    routing = module.route(x)
    cotangent = tokens(40, 6, seed=1)
    (got,) = torch.autograd.grad((routing.top_k_weights * cotangent).sum(), routing.scores, retain_graph=True)
    used = routing.top_k_index < 12
    expected = torch.zeros(40, 13, dtype=torch.float64).scatter(1, routing.top_k_index, torch.where(used, cotangent, 0))[:, :12]
    torch.testing.assert_close(got, expected)


def test_the_output_bias_is_added_once_whatever_the_experts():
    module, x = mixture(output_bias=True, min_experts=0), tokens(40, 32)
    assert (module.output_bias == 0).all()
    before = module(x)
    with torch.no_grad():
        module.output_bias.copy_(tokens(32, seed=2))
    torch.testing.assert_close(module(x), before + module.output_bias)


def test_dropout_is_of_the_output_and_of_training():
    module, x = mixture(dropout=0.25), tokens(400, 32)
    torch.manual_seed(1)
    got = module(x)
    expected = module.eval()(x)
    kept = got != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(got[kept], expected[kept] / 0.75)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_neurons_in_order(groups):
    assert torch.equal(neurons_in_order(12, groups).flatten(), torch.arange(12))
    assert neurons_in_order(12, groups).shape == (groups, 12 // groups)


def greedy(similarity: torch.Tensor) -> list[int]:
    """Pairs from the most similar on, one by one."""
    rows, groups = similarity.shape
    room, found = [rows // groups] * groups, [-1] * rows
    pairs = sorted(itertools.product(range(rows), range(groups)), key=lambda pair: -similarity[pair].item())
    for row, group in pairs:
        if found[row] < 0 and room[group]:
            found[row] = group
            room[group] -= 1
    return found


@pytest.mark.parametrize(("rows", "groups"), [(6, 6), (24, 4), (60, 12), (60, 1)])
def test_groups_fill_from_the_most_similar_pair_on(rows, groups):
    similarity = tokens(rows, groups, seed=rows)
    similarity[:, 0] += 1  # wanted by most
    assert balanced_assignment(similarity).tolist() == greedy(similarity)


def test_neurons_that_are_active_together_share_a_group():
    topics = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    owner = torch.arange(32) % 4  # interleaved, so that order alone would not do
    strength = torch.where(topics[:, None] == owner, 3.0, 0.3)
    found = coactive_neurons(strength * tokens(300, 32, seed=1).sign() * (1 + 0.2 * tokens(300, 32, seed=2)), 4)
    assert found.shape == (4, 8)
    assert sorted(found.flatten().tolist()) == list(range(32))
    assert all(len(owner[group].unique()) == 1 for group in found)


def test_nothing_is_made_on_another_device_than_the_mixtures():
    found = coactive_neurons(tokens(50, 12), 3)
    with torch.device("meta"):  # what names no device goes there, and can neither be read nor meet anything else
        assert torch.equal(coactive_neurons(tokens(50, 12), 3), found)
        assert neurons_in_order(12, 3).device.type == "cpu"
        module = DynMoE(32, 8, 12, target_k=3.0, max_experts=6, device="cpu")
        module(torch.ones(4, 32, device="cpu")).sum().backward()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
