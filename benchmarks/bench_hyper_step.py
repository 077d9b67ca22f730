"""Cost of a step that trains the routers, against a step that does not and against the form that retains the main graph.

The model consists of mixtures with residual connections; without attention, the overhead of the step is most visible. The gradients of
both forms that train routers are checked to be equal before timing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tinyonn import ops
from tinyonn.nn import DynMoE
from tinyonn.testing import assert_close_rms
from tinyonn.train import HyperStep, capture

LAYERS, FEATURES = 4, 256
SIZES = {  # tokens, experts, neurons, slots
    "64 experts of 32": (1024, 64, 32, 4),
    "256 experts of 8": (1024, 256, 8, 8),
}
MEMORY_GOAL = 1.05


class Model(nn.Module):
    def __init__(self, experts: int, neurons: int, slots: int) -> None:
        super().__init__()
        options = {"target_k": slots / 2, "max_experts": slots, "gating_loss": "surprise"}
        self.layers = nn.ModuleList(DynMoE(FEATURES, neurons, experts, **options) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class HandOut(torch.optim.SGD):
    """An optimizer that changes no parameter, so every step has the same gradients; `zero_grad` moves them to `taken`."""

    found: tuple[Tensor, ...] = ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        parameters = self.param_groups[0]["params"]
        self.found = tuple(parameter.grad for parameter in parameters)
        for parameter in parameters:
            parameter.grad = None

    def taken(self) -> tuple[Tensor, ...]:
        found, self.found = self.found, ()
        return found


def candidates_of(size: str, device: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Functions that each run a whole step and return the gradients."""
    tokens, experts, neurons, slots = SIZES[size]
    torch.manual_seed(0)
    model = Model(experts, neurons, slots).to(device)
    x, y = torch.randn(2, tokens, FEATURES, device=device)
    optimizer = HandOut(model.parameters(), lr=0.0)
    step = HyperStep(model, optimizer)

    def loss() -> Tensor:
        out: Tensor = model(x)
        return (out - y).square().mean()

    def hyper_step() -> tuple[Tensor, ...]:
        step(loss)
        return optimizer.taken()

    def ordinary() -> tuple[Tensor, ...]:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.taken()

    def retained() -> tuple[Tensor, ...]:
        with capture(model) as visits:
            loss().backward(retain_graph=True)
            total = torch.zeros((), device=device)
            for module, calls in visits.items():
                # Scores are recomputed from detached inputs, so that a router's loss does not reach earlier layers.
                scores = module.router(calls[0].hidden_states).scores
                total = total + ops.surprise_min_loss(scores, module.surprise(calls[0])) / len(visits)
            total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.taken()

    return {"HyperStep": hyper_step, "an ordinary step": ordinary, "retain_graph=True": retained}


def check(outputs: dict[str, tuple[Tensor, ...]]) -> None:
    for got, wanted in zip(outputs["HyperStep"], outputs["retain_graph=True"], strict=True):
        assert_close_rms(got, wanted.double(), 1e-6)
    apart = sum(not torch.equal(got, other) for got, other in zip(outputs["HyperStep"], outputs["an ordinary step"], strict=True))
    assert apart >= 2 * LAYERS  # prototypes and thresholds learn


@pytest.mark.parametrize("size", SIZES)
def test_a_step(compare, device, peak_megabytes, size):
    candidates = candidates_of(size, device)
    check({name: call() for name, call in candidates.items()})
    memory = {name: round(peak_megabytes(call), 2) for name, call in candidates.items()}
    share = memory["HyperStep"] / memory["an ordinary step"]
    tokens, experts, neurons, slots = SIZES[size]
    compare(
        f"training step, {LAYERS} mixtures, {tokens} tokens x {FEATURES}, {experts} experts of {neurons}, {slots} slots, {device}",
        candidates,
        check,
        info={"peak MB": memory, "memory beside an ordinary step": round(share, 3), "goal": f"<= {MEMORY_GOAL}x memory"},
    )
    assert share <= MEMORY_GOAL
