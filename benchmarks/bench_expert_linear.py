"""`expert_linear` against the same projection by `grouped_mm`, and by a loop over experts, forward and backward.

    .venv/bin/python -m pytest benchmarks/bench_expert_linear.py --benchmark-only

Outputs and gradients are checked to be equal before timing. Tensors are float32 on a CPU and bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench_expert_mlp import DTYPE, TOLERANCE, check_close
from torch import Tensor
from torch.nn import functional

from tinyonn import ops

SIZES = {  # tokens, features, experts, outputs, slots
    "128 experts, 512 to 192": (2048, 512, 128, 192, 4),
    "64 experts, 1024 to 192": (2048, 1024, 64, 192, 4),
}
GOAL = "grouped_mm >= 0.9x"


class Case:
    """A row per token and a result per slot, as queries, keys and values of heads; or rows per slot, summed, as their outputs."""

    def __init__(self, size: tuple[int, ...], summed: bool, device: str) -> None:
        tokens, features, experts, outputs, slots = size
        generator = torch.Generator().manual_seed(0)
        self.summed = summed
        if summed:
            features, outputs = outputs, features

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, DTYPE[device]).requires_grad_()

        self.x = draw(tokens, slots, features) if summed else draw(tokens, features)
        self.weight = draw(experts, outputs, features, scale=features**-0.5)
        self.weights = draw(tokens, slots) if summed else None
        self.index = torch.rand(tokens, experts, generator=generator).topk(slots).indices.to(device)
        self.leaves = [x for x in (self.x, self.weight, self.weights) if x is not None]
        self.cotangent = torch.randn(ours(self).shape, generator=generator).to(device, DTYPE[device])

    def step(self, form: Callable[[Case], Tensor]) -> tuple[Tensor, ...]:
        out = form(self)
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.cotangent))


def ours(c: Case) -> Tensor:
    return ops.expert_linear(c.x, c.weight, c.index, c.weights)


def with_surprise(c: Case) -> Tensor:
    return ops.expert_linear(c.x, c.weight, c.index, c.weights, surprise=torch.zeros(c.index.shape, device=c.x.device, requires_grad=True))


def over_grouped_mm(c: Case) -> Tensor:
    """Sorts once and differentiates by autograd: the best form that needs no library."""
    expert, order = c.index.flatten().sort(stable=True)
    ends = torch.bincount(expert, minlength=len(c.weight)).cumsum(0).to(torch.int32)
    rows = c.x.flatten(0, 1)[order] if c.summed else c.x[order // c.index.shape[1]]
    out = functional.grouped_mm(rows, c.weight.mT, offs=ends)
    if c.weights is not None:
        out = out * c.weights.flatten()[order, None]
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    found = out[places].unflatten(0, c.index.shape)
    return found.sum(1) if c.summed else found


def loop(c: Case) -> Tensor:
    found = c.x.new_zeros(*c.index.shape, c.weight.shape[1])
    for expert, weight in enumerate(c.weight.unbind()):
        token, slot = (c.index == expert).nonzero(as_tuple=True)
        found = found.index_put((token, slot), functional.linear(c.x[token, slot] if c.summed else c.x[token], weight))
    return found if c.weights is None else (found * c.weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("summed", [False, True], ids=["per slot", "summed"])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(compare, device, size, summed):
    c = Case(SIZES[size], summed, device)
    forms = {"expert_linear": ours, "expert_linear, surprise": with_surprise, "over grouped_mm": over_grouped_mm, "loop over experts": loop}

    def check(outputs: dict[str, tuple[Tensor, ...]]) -> dict[str, float]:
        reference = outputs["over grouped_mm"]
        return {
            name: max(
                check_close(got, wanted, TOLERANCE[DTYPE[device]], f"part {part} of {name}")
                for part, (got, wanted) in enumerate(zip(values, reference, strict=True))
            )
            for name, values in outputs.items()
            if values is not reference
        }

    kind = "rows per slot, summed" if summed else "a row per token, a result per slot"
    candidates = {name: partial(c.step, form) for name, form in forms.items()}
    compare(f"linear, {size}, {kind}, {device}", candidates, check, info={"goal": GOAL})
