"""Signed saving as the surprise that trains a router: its sign, and a ranking inside the chosen set."""

from __future__ import annotations

import pytest
import torch

from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep, SurpriseLoss, capture_surprise


def mixture(**options) -> DynMoE:
    torch.manual_seed(0)
    return DynMoE(16, 8, 6, **{"target_k": 3.0, "max_experts": 5, "gating_loss": "surprise", "surprise_kind": "saving", **options})


def tokens(number: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))


def rise_without(module: DynMoE, x: torch.Tensor, token: int, slot: int) -> float:
    """Rise of a loss that is linear in the output, if the pair is left out."""
    routing = module.route(x)
    less = routing._replace(top_k_weights=routing.top_k_weights.clone())
    less.top_k_weights[token, slot] = 0
    with torch.no_grad():
        return ((module.execute(x, less) - module.execute(x, routing)) * tokens(seed=1)).sum().item()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_captured_saving_is_what_the_loss_rises_by_without_the_pair(checkpoint):
    module, x = mixture(checkpoint=checkpoint), tokens()
    with capture_surprise(module) as found:
        (module(x) * tokens(seed=1)).sum().backward()
    routing = module.route(x)
    for token, slot in (routing.top_k_index[:10] < 6).nonzero().tolist():
        saving = found[""][token, routing.top_k_index[token, slot]] * routing.top_k_weights[token, slot]
        assert saving.item() == pytest.approx(rise_without(module, x, token, slot), rel=1e-3, abs=1e-5)


def test_the_loss_is_that_of_the_greatest_saving_inside_the_chosen_set():
    """By hand: cross-entropy with the expert of greatest saving, and the divergence from a softmax of savings, over chosen experts only."""
    module, x = mixture(), tokens()
    with module.capturing() as visits:
        (module(x) * tokens(seed=1)).sum().backward()
    loss = module.gating_loss(visits[0])
    scores, saving = module.route(x).scores.double(), module.surprise(visits[0]).double()
    total = 0.0
    for row, found in zip(scores, saving, strict=True):
        chosen = found.isfinite()
        u = found[chosen] / found[chosen].abs().mean()
        log_q, log_p = row[chosen].log_softmax(-1), u.log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum() - log_q[u.argmax()]
    torch.testing.assert_close(loss.double(), total / len(x), rtol=1e-5, atol=1e-6)
    everywhere = module.gating_loss(visits[0], surprise_loss=SurpriseLoss(among="all"))
    assert not torch.isclose(loss, everywhere)


def test_a_step_raises_the_score_of_the_expert_that_saves_most():
    """An expert that only does harm loses, whatever its norm."""
    module, x = mixture(target_k=5.0), tokens()
    with torch.no_grad():
        module.gate_up_proj.copy_(module.gate_up_proj[:1].expand_as(module.gate_up_proj))
        module.down_proj.copy_(module.down_proj[:1].expand_as(module.down_proj))
        module.down_proj[3] *= -0.1  # the opposite of the others, and smaller: the least norm of its gradient
    with torch.no_grad():
        alone = module.execute(x, module.route(x)._replace(top_k_weights=(module.route(x).top_k_index == 0).float()))
    target = 3 * alone

    def loss() -> torch.Tensor:
        return (module(x) - target).square().mean()

    before = module.route(x).scores
    seen = (module.route(x).top_k_index == 3).any(-1) & (module.route(x).top_k_index == 0).any(-1)
    optimizer = torch.optim.SGD(module.router.parameters(), lr=0.5)
    HyperStep(module, optimizer, torch.optim.SGD([p for n, p in module.named_parameters() if "router" not in n], 0.0), gating_weight=10.0)(
        loss
    )
    moved = (module.route(x).scores - before)[seen]
    assert seen.sum() > 10
    assert moved[:, 3].mean() < 0 < moved[:, 0].mean()
