"""∫SPS over the planes of a scan, against the usual PyTorch expressions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tinyonn.ops import integrate_sps
from tinyonn.testing import assert_close_rms

# SmolLM2-135M: 30 decoder layers of 81 blocks, and an output head of 768.
OFFSETS = [*range(0, 30 * 81 + 1, 81), 30 * 81 + 768]


def _z(values: torch.Tensor) -> torch.Tensor:
    mean = values.nanmean(-1, keepdim=True)
    deviation = values - mean
    std = deviation.square().nanmean(-1, keepdim=True).sqrt()
    return torch.where(std <= 1e-6 * mean.abs(), torch.zeros_like(deviation), deviation / std)


def _torch_expression(activation: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    sums = []
    for start, stop in pairwise(OFFSETS):
        sps = _z(activation[:, start:stop]) - _z(grad_norm[:, start:stop])
        sums.append(sps.double().nansum(0))
    return torch.cat(sums)


def _segment_expression(activation: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """All layers at once by `index_add`, without a loop."""
    device = activation.device
    layer = torch.bucketize(torch.arange(OFFSETS[-1], device=device), torch.tensor(OFFSETS[1:], device=device), right=True)
    missing = activation.isnan() | grad_norm.isnan()

    def segment_mean(values: torch.Tensor) -> torch.Tensor:
        def sums_of(v: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(v), len(OFFSETS) - 1, device=device).index_add_(1, layer, v)

        return (sums_of(values) / sums_of((~missing).float()).clamp(min=1))[:, layer]

    def standardised(values: torch.Tensor) -> torch.Tensor:
        mean = segment_mean(values.masked_fill(missing, 0))
        deviation = (values - mean).masked_fill(missing, 0)
        std = segment_mean(deviation.square()).sqrt()
        return torch.where(std <= 1e-6 * mean.abs(), 0, deviation / std)

    return (standardised(activation) - standardised(grad_norm)).sum(0, dtype=torch.float64)


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "last-token-missing"])
def test_integrate_sps(compare, device, missing):
    activation, grad_norm = (torch.randn(512, OFFSETS[-1], device=device).exp() for _ in range(2))
    offsets = torch.tensor(OFFSETS, device=device)
    if missing:
        activation[-1] = grad_norm[-1] = math.nan

    def agree(outputs: dict[str, torch.Tensor]) -> None:
        for name, total in outputs.items():
            assert_close_rms(total, outputs["tinyonn"], 1e-5, name)

    compare(
        f"∫SPS, 512 tokens x {OFFSETS[-1]} blocks, 31 layers{', last token missing' if missing else ''}, {device}",
        {
            "tinyonn": lambda: integrate_sps(activation, grad_norm, offsets),
            "torch, layer by layer": lambda: _torch_expression(activation, grad_norm),
            "torch, index_add over layers": lambda: _segment_expression(activation, grad_norm),
        },
        agree,
        info={"bytes_read": activation.nbytes + grad_norm.nbytes},
    )
