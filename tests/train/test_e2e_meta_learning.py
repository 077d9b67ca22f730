"""The router learns: of two experts that do the same, tokens come to prefer the one that is surprised less.

The task is a language of 24 words, each followed by the word at 5 w + 3. An expert that has learnt it alone is planted twice into a
mixture of random ones: as it is, and with its hidden values eight times smaller and its output weights eight times larger. Both give every
token the same, so the language loss cannot tell them apart; the gradient that they cause can.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tinyonn.nn import DynMoE
from tinyonn.train import HyperStep

WORDS, CHEAP, DEAR, EXPERTS = 24, 1, 4, 6


class Language(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.norm = nn.LayerNorm(16)
        self.experts = DynMoE(16, 12, **options)
        self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        return self.head(x + self.experts(self.norm(x)))

    def loss(self, words: Tensor) -> Tensor:
        return functional.cross_entropy(self(words), (5 * words + 3) % WORDS)


def batch(seed: int) -> Tensor:
    return torch.randint(WORDS, (64,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def planted() -> Language:
    torch.manual_seed(0)
    alone = Language(num_experts=1, target_k=1.0, max_experts=1)
    optimizer = torch.optim.Adam(alone.parameters(), 0.02)
    for seed in range(150):
        optimizer.zero_grad()
        alone.loss(batch(seed)).backward()
        optimizer.step()
    model = Language(num_experts=EXPERTS, target_k=4.0, max_experts=EXPERTS, scale=4.0, gating_loss="surprise")
    with torch.no_grad():
        for part in ("embedding", "norm", "head"):
            getattr(model, part).load_state_dict(getattr(alone, part).state_dict())
        model.experts.gate_up_proj.normal_()  # as loud as what has learnt something
        model.experts.down_proj.normal_(std=0.3)
        for expert, factor in ((CHEAP, 8.0), (DEAR, 1.0)):
            model.experts.gate_up_proj[expert] = alone.experts.gate_up_proj[0]
            model.experts.gate_up_proj[expert, 12:] /= factor  # the half that enters as it is
            model.experts.down_proj[expert] = alone.experts.down_proj[0] * factor
    return model


@torch.no_grad()
def mass(model: Language) -> Tensor:
    """(E,): the share of each expert in the tokens' weights."""
    found = model.experts.route(model.norm(model.embedding.weight))
    total = torch.zeros(EXPERTS + 1).index_add(0, found.top_k_index.flatten(), found.top_k_weights.flatten())
    return total[:EXPERTS] / WORDS


def trained(model: Language, gating_weight: float) -> tuple[Language, float]:
    model = copy.deepcopy(model)
    model.experts.gate_up_proj.requires_grad_(False)  # or the experts would change, and what they cost
    model.experts.down_proj.requires_grad_(False)
    step = HyperStep(model, torch.optim.Adam(model.parameters(), 0.01), gating_weight=gating_weight)
    for seed in range(150):
        loss = step(lambda seed=seed: model.loss(batch(seed))).loss
    return model, loss.item()


def test_the_planted_experts_do_the_same(planted):
    x = planted.norm(planted.embedding.weight)
    one = torch.ones(WORDS, 1)
    routings = [planted.experts.route(x)._replace(top_k_index=torch.full((WORDS, 1), e), top_k_weights=one) for e in (CHEAP, DEAR)]
    outs = [planted.experts.execute(x, routing) for routing in routings]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    alone = planted.head(planted.embedding.weight + outs[0])
    words = torch.arange(WORDS)
    assert (alone.argmax(-1) == (5 * words + 3) % WORDS).all()  # it has learnt the task


def test_routing_moves_to_the_cheaper_of_two_that_fit_and_only_by_the_routers_loss(planted):
    before = mass(planted)
    (learnt, loss), (control, control_loss) = (trained(planted, weight) for weight in (1.0, 0.0))
    after, without = mass(learnt), mass(control)
    assert max(loss, control_loss) < 0.05  # both solve the task
    assert after[CHEAP] > max(0.5, 3 * before[CHEAP])
    assert after[CHEAP] > 1.5 * after[DEAR]
    assert without[CHEAP] < 0.4
    assert without[CHEAP] < 1.5 * without[DEAR]
