"""A step of `LazyAdamW` on stacked experts, against PyTorch's AdamW in its two fast forms, which update all experts.

Few experts have a gradient, as with many experts and few tokens, or all of them. The active rows of all candidates are checked to be equal,
and idle ones of ours to be unchanged, before timing. Each fused or foreach candidate of ours runs the same code as its peer on active rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyonn.train import LazyAdamW

EXPERTS = 64
SIZES = {"experts of 128 x 256": (128, 256), "experts of 16 x 64": (16, 64)}  # rows that are updated in place, and copied
SHARES = {"5 % active": 3, "half active": 32, "all active": EXPERTS}
FORMS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def candidates_of(size: str, active: int, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Functions that each do a step and return the weights; the gradients stay the same."""
    neurons, features = SIZES[size]
    shapes = [(EXPERTS, 2 * neurons, features), (EXPERTS, features, neurons), (EXPERTS, features)]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(EXPERTS, generator=generator)[:active]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.zeros(shape) for shape in shapes]
    for grad in grads:
        grad[rows] = torch.randn(grad[rows].shape, generator=generator)

    def candidate(lazy: bool, form: dict[str, Any]) -> Callable[[], list[Tensor]]:
        weights = [nn.Parameter(x.clone().to(device)) for x in start]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.to(device)
        optimizer = LazyAdamW(weights, pools=weights, **form) if lazy else torch.optim.AdamW(weights, **form)

        def step() -> list[Tensor]:
            optimizer.step()
            return [weight.detach() for weight in weights]

        return step

    ours = {f"LazyAdamW, {name}": candidate(True, form) for name, form in FORMS.items()}
    return ours | {f"AdamW, {name}": candidate(False, form) for name, form in FORMS.items()}


def check(outputs: dict[str, list[Tensor]], starts: dict[str, list[Tensor]], active: int) -> None:
    """`starts` has the weights before the step."""
    for form in FORMS:
        ours, theirs = (outputs[f"{kind}, {form}"] for kind in ("LazyAdamW", "AdamW"))
        for found, wanted, start in zip(ours, theirs, starts[f"LazyAdamW, {form}"], strict=True):
            moved = (found != start).flatten(1).any(1)
            assert int(moved.sum()) == active
            assert torch.equal(found[moved], wanted[moved])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("size", SIZES)
def test_a_step(compare, device, size, share):
    active = SHARES[share]
    candidates = candidates_of(size, active, device)
    before = {name: [x.clone() for x in call()] for name, call in candidates.items()}
    check({name: call() for name, call in candidates.items()}, before, active)
    result = compare(f"step of AdamW, {EXPERTS} {size}, {share}, {device}", candidates, info={"active experts": active})
    result.info["fused"] = round(result.ratio("AdamW, fused"), 2)
    result.info["foreach"] = round(result.median("AdamW, foreach") / result.median("LazyAdamW, foreach"), 2)
