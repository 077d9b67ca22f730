"""Calls of DynMoE layers are captured with their surprise, whatever wraps the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinyonn.nn import DynMoE
from tinyonn.train import capture


class DeepSpeedEngine(nn.Module):
    """A wrapper known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, DeepSpeedEngine])
def test_calls_are_captured_under_any_wrapper(wrap):
    """`capture` adds no gradients, so a wrapper with gradients of its own is no obstacle."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(*(DynMoE(16, 8, 6, target_k=2.5, max_experts=4, thresholds="learned") for _ in range(2))),
        torch.randn(20, 16),
        torch.randn(20, 16),
    )
    with capture(model) as wanted:
        (model(x) - y).square().mean().backward()
    with capture(wrap(model)) as visits:
        (wrap(model)(x) - y).square().mean().backward()
    assert list(visits) == list(model)
    for layer, [visit] in visits.items():
        assert torch.equal(layer.surprise(visit), layer.surprise(wanted[layer][0]))


def test_nothing_to_capture_is_named():
    with pytest.raises(TypeError, match=r"model contains no tinyonn\.nn\.DynMoE or DynSMHA layer \(got Linear\)"), capture(nn.Linear(2, 2)):
        pass
