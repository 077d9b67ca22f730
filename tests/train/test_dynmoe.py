"""A larger budget activates more experts: in a decoder that is trained and asked through its keyword alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinyonn.hf.dyn_moe import convert_mlp_to_dynmoe, expert_statistics
from tinyonn.nn import DynMoE
from tinyonn.testing import tiny_causal_lm, token_ids
from tinyonn.train import HyperStep

BUDGETS = (0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    """A few steps on one text, each with another budget."""
    model = tiny_causal_lm("llama", intermediate_size=96)
    convert_mlp_to_dynmoe(model, num_experts=8, sample=token_ids(), routing="budget", scale=10.0)
    step = HyperStep(model.train(), torch.optim.Adam(model.parameters(), lr=3e-3), gating_weight=0.1)
    x = token_ids(40)
    for turn in range(20):
        step(lambda budget=BUDGETS[turn % 5]: model(x, labels=x, surprise_budget=budget).loss)
    return model.eval()


@torch.no_grad()
def look(model: PreTrainedModel, x: Tensor, budget: Tensor | float) -> tuple[list[float], float]:
    """Experts of a token by layer, and the loss."""
    expert_statistics(model, reset=True)
    loss = model(x, labels=x, surprise_budget=budget).loss.item()
    return [found["mean_k"] for found in expert_statistics(model).values()], loss


def test_a_larger_budget_activates_more_experts_in_every_layer(decoder):
    x = token_ids(40)
    found = [look(decoder, x, budget) for budget in BUDGETS]
    for layer in zip(*(counts for counts, _ in found), strict=True):
        assert all(less < more for less, more in itertools.pairwise(layer))
        assert layer[0] >= 1
        assert layer[-1] == 8
    assert found[-1][1] < math.log(97) - 0.5  # of 97 words; and it has learnt something
    assert found[-1][1] < found[0][1]  # for which more experts are of use


def test_the_counts_are_what_the_budget_asks_for(decoder):
    """By the definition: of the shares in descending order, as many as it takes to hold the budget."""
    x, inputs = token_ids(40), {}
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, DynMoE)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
        for name, module in layers.items()
    ]
    counts, _ = look(decoder, x, 0.55)
    for handle in handles:
        handle.remove()
    for (name, module), mean in zip(layers.items(), counts, strict=True):
        share = module.router(inputs[name]).scores.double().softmax(-1).sort(-1, descending=True).values
        number = (share.cumsum(-1) < 0.55).sum(-1) + 1
        assert mean == pytest.approx(number.double().mean().item(), abs=0.03)


def test_a_budget_of_each_token_is_that_of_none_other(decoder):
    x = token_ids(40)
    budget = torch.where(torch.arange(40) < 20, 0.2, 1.0).expand(x.shape)
    with torch.no_grad():
        mixed, low = (decoder(x, surprise_budget=given).logits for given in (budget, 0.2))
    torch.testing.assert_close(mixed[:, :20], low[:, :20])  # what comes later is not seen
    assert not torch.allclose(mixed[:, 20:], low[:, 20:])


def test_experts_without_a_token_are_counted_dead():
    torch.manual_seed(0)
    module = DynMoE(16, 8, 6, target_k=2.0, max_experts=6, routing="budget", surprise_budget=1e-6)
    x = module.router.prototypes[[1, 3, 3, 5]].detach()
    module(x)
    found = module.statistics()
    assert found["counts"].tolist() == [0, 1, 0, 2, 0, 1]
    assert (found["mean_k"], found["dead_experts"]) == (1.0, 3)
    module(x, surprise_budget=1.0)
    found = module.statistics()
    assert found["counts"].tolist() == [4, 5, 4, 6, 4, 5]
    assert (found["mean_k"], found["dead_experts"]) == (3.5, 0)


def test_experts_that_are_not_live_are_no_part_of_any_budget():
    """Training does not touch them; once live, they are chosen."""
    torch.manual_seed(0)
    module = DynMoE(16, 8, 4, max_num_experts=7, target_k=2.0, max_experts=7, routing="budget", surprise_budget=1.0, gating_loss="both")
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    step = HyperStep(module, torch.optim.SGD(module.parameters(), 0.1))
    for _ in range(3):
        step(lambda: (module(x) - x).square().mean())
    found = module.statistics()
    assert found["counts"].tolist() == [192] * 4 + [0] * 3
    assert (found["mean_k"], found["dead_experts"]) == (4.0, 0)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter[4:], before[name][4:])
        assert not torch.equal(parameter[:4], before[name][:4])
    module.router.expert_mask[5] = True
    module.reset_statistics()
    module(x)
    assert module.statistics()["counts"].tolist() == [64, 64, 64, 64, 0, 64, 0]
