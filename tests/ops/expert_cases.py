"""Weights, routings and tokens for the tests of `expert_mlp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMPLS = ("torch", "reference")
KINDS = ("down_proj", "expert", "output")
LAYOUTS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"activation": "gelu"},
    "gelu-tanh": {"activation": "gelu_tanh", "transposed": True},
    "relu2": {"activation": "relu2", "gated": False},
    "no-gate-gelu": {"activation": "gelu", "gated": False, "transposed": True},
    "gpt-oss": {"activation": "clamped_swiglu", "interleaved": True, "transposed": True},
    "clamped-halves": {"activation": "clamped_swiglu"},
    "clamped-at-2": {"activation": "clamped_swiglu", "limit": 2.0},
    "deepseek-v4": {"activation": "clamped_silu", "limit": 3.0},
    "clamped-silu-interleaved": {"activation": "clamped_silu", "limit": 2, "interleaved": True, "transposed": True},
    "clamped-silu-no-gate": {"activation": "clamped_silu", "limit": 1.5, "gated": False},
    "interleaved": {"interleaved": True},
}


def weights(
    experts: int, neurons: int, features: int, *, layout: dict[str, Any] | None = None, biased: bool = False, dtype=torch.float64, seed=0
) -> dict[str, Tensor | None]:
    """gate_up_proj, down_proj and the biases, of a size that reaches the clamps."""
    layout = layout or {}
    generator = torch.Generator().manual_seed(seed)
    width = 2 * neurons if layout.get("gated", True) else neurons

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down = 3 * draw(experts, width, features) / features**0.5, draw(experts, features, neurons) / neurons**0.5
    if layout.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    bias = {"gate_up_bias": draw(experts, width), "down_bias": draw(experts, features)} if biased else {}
    found = {"gate_up_proj": up, "down_proj": down, "gate_up_bias": bias.get("gate_up_bias"), "down_bias": bias.get("down_bias")}
    return {name: None if x is None else x.to(dtype) for name, x in found.items()}


def routing(tokens: int, slots: int, experts: int, *, unused: float = 0.3, seed: int = 1, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Distinct experts a token; a share of the slots unused."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    weight = torch.rand(tokens, slots, generator=generator, dtype=torch.float64) + 0.1
    hidden = torch.rand(tokens, slots, generator=generator) < unused
    return index.masked_fill(hidden, experts), weight.masked_fill(hidden, 0).to(dtype)


def tokens_of(tokens: int, features: int, dtype=torch.float64) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def leaves_of(*tensors: Tensor | None) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors if x is not None and x.is_floating_point()]
