"""`expert_mlp` beside the ways people write a mixture of small experts, surprise on and off.

Every candidate gets the same routing and gives the same output and gradients, which is checked before anything is timed. The dense form
computes every expert for every token; the loop gathers each expert's tokens and adds its output back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from tinyonn import ops
from tinyonn.testing import assert_close_rms

SIZES = {  # tokens, features, experts, neurons, slots
    "128 experts of 64": (2048, 512, 128, 64, 4),
    "64 experts of 128": (2048, 512, 64, 128, 2),
    "1024 experts of 16": (2048, 512, 1024, 16, 8),
    "4096 experts of 8": (1024, 256, 4096, 8, 16),
}
DENSE_ELEMENTS = 1 << 28  # the dense form writes tokens x experts x features
LOOPED_EXPERTS = 1024


class Case(SimpleNamespace):
    """Leaves and routing of one size."""

    x: Tensor
    up: Tensor
    down: Tensor
    index: Tensor
    weight: Tensor
    cotangent: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.up, self.down, self.weight]


def case(size: str, device: str, dtype: torch.dtype = torch.float32) -> Case:
    tokens, features, experts, neurons, slots = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices.to(device)
    found = Case(
        x=draw(tokens, features),
        up=draw(experts, 2 * neurons, features, scale=features**-0.5),
        down=draw(experts, features, neurons, scale=neurons**-0.5),
        index=index,
        weight=draw(tokens, slots).abs(),
        cotangent=draw(tokens, features),
    )
    for leaf in found.leaves:
        leaf.requires_grad_()
    return found


def gated(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, -1)
    return functional.silu(gate) * up


def dense(c: Case) -> Tensor:
    """Every expert for every token, weighed with a matrix that is mostly zero."""
    whole = torch.zeros(len(c.x), len(c.up), dtype=c.weight.dtype, device=c.x.device).scatter_add(1, c.index, c.weight)
    h = gated(torch.einsum("nf,eif->nei", c.x, c.up))
    return torch.einsum("nei,efi,ne->nf", h, c.down, whole)


def loop(c: Case) -> Tensor:
    """As transformers' eager form: one expert after another."""
    out = torch.zeros_like(c.x)
    for expert in torch.unique(c.index).tolist():
        token, slot = (c.index == expert).nonzero(as_tuple=True)
        part = functional.linear(gated(functional.linear(c.x[token], c.up[expert])), c.down[expert])
        out = out.index_add(0, token, part * c.weight[token, slot, None])
    return out


def step_over_grouped_mm(c: Case) -> Tensor:
    """Sorted once, differentiated by autograd: what there is without a library."""
    flat = c.index.flatten()
    expert, order = flat.sort(stable=True)
    ends = torch.bincount(expert, minlength=len(c.up)).cumsum(0).to(torch.int32)
    h = gated(functional.grouped_mm(c.x[order // c.index.shape[1]], c.up.mT, offs=ends))
    out = functional.grouped_mm(h, c.down.mT, offs=ends) * c.weight.flatten()[order, None]
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return out[places].unflatten(0, c.index.shape).sum(1)


def of_transformers(name: str, c: Case) -> Tensor:
    module = SimpleNamespace(
        gate_up_proj=c.up, down_proj=c.down, num_experts=len(c.up), act_fn=functional.silu, has_gate=True, has_bias=False,
        is_transposed=False, is_concatenated=True, has_post_expert_norm=False, _is_expert_parallel=False,
    )  # fmt: skip
    module._apply_gate = lambda pre: _default_apply_gate(module, pre)
    return ALL_EXPERTS_FUNCTIONS[name](module, c.x, c.index, c.weight)


def ours(c: Case, probe: Tensor | None = None) -> Tensor:
    return ops.expert_mlp(c.x, c.up, c.down, c.index, c.weight, surprise=probe)


def candidates_of(c: Case) -> dict[str, Callable[[], Any]]:
    def run(call: Callable[[], Tensor], *more: Tensor) -> Any:
        out = call()
        return (out.detach(), *torch.autograd.grad(out, [*c.leaves, *more], c.cotangent))

    def with_surprise() -> Any:
        probe = torch.zeros(c.index.shape, device=c.x.device, requires_grad=True)
        return run(lambda: ours(c, probe), probe)

    found = {
        "expert_mlp, surprise": with_surprise,
        "expert_mlp": lambda: run(lambda: ours(c)),
        "step over grouped_mm": lambda: run(lambda: step_over_grouped_mm(c)),
        "transformers, grouped_mm": lambda: run(lambda: of_transformers("grouped_mm", c)),
    }
    if len(c.up) <= LOOPED_EXPERTS:
        found["loop over experts"] = lambda: run(lambda: loop(c))
    if c.x.numel() * len(c.up) <= DENSE_ELEMENTS:
        found["dense einsum"] = lambda: run(lambda: dense(c))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(compare, device, size):
    c = case(size, device)

    def check(outputs: dict[str, Any]) -> None:
        for name, values in outputs.items():
            for got, wanted in zip(values, outputs["step over grouped_mm"], strict=False):
                assert_close_rms(got, wanted.double(), 1e-4, name)

    goal = "dense >= 50x, loop >= 20x, grouped_mm >= 0.9x" if size == next(iter(SIZES)) else ""
    tokens, features, experts, neurons, slots = SIZES[size]
    compare(
        f"mixture, forward + backward, {tokens} tokens x {features}, {experts} experts of {neurons}, {slots} a token, {device}",
        candidates_of(c),
        check,
        info={"goal": goal},
    )


def peak_megabytes(call: Callable[[], Any], device: str) -> float:
    """The most memory that one call allocates beyond what there was."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 1e6


@pytest.mark.parametrize("size", [next(iter(SIZES))])
def test_memory(benchmark, device, size):
    """Peak of forward and backward, gradients included; not a time."""
    found = {name: round(peak_megabytes(call, device)) for name, call in candidates_of(case(size, device)).items()}
    benchmark.extra_info["peak MB"] = found
    print(f"\npeak MB, {size}, {device}: {found}")
    assert found["expert_mlp, surprise"] <= found["expert_mlp"] * 1.05
    assert found["expert_mlp"] <= found["step over grouped_mm"] * 1.25
    benchmark.pedantic(lambda: None)
