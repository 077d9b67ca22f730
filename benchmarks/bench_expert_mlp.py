"""`expert_mlp` against common implementations of a mixture of small experts, with and without surprise and checkpointing.

All candidates have the same routing. Their outputs and gradients are checked to be equal before timing. The dense forms compute every
expert for every token; the loops gather each expert's tokens and add its output back. Tensors are float32 on a CPU and bfloat16 on a GPU.
`expert_dispatch.py` measures where the dense forms begin to win.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from predicted import predicted
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tinyonn import ops
from tinyonn.testing.timing import Comparison, peak_megabytes

SIZES = {  # tokens, features, experts, neurons, slots
    "128 experts of 64": (2048, 512, 128, 64, 4),
    "64 experts of 128": (2048, 512, 64, 128, 2),
    "256 experts of 32, one a token": (1024, 256, 256, 32, 1),
    "1024 experts of 16": (2048, 512, 1024, 16, 8),
    "4096 experts of 8": (1024, 256, 4096, 8, 16),
    "1024 experts of 64, 16k tokens": (16384, 1024, 1024, 64, 8),
}
GPU_SIZES = ("1024 experts of 64, 16k tokens",)
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# Limits on the cost of a candidate; a more expensive one has no row.
DENSE_OPERATIONS = {"cpu": 2e11, "cuda": 5e13}  # seconds on one core, and on a GPU
DENSE_ELEMENTS = 1 << 27  # tokens x experts x features, which the naive dense form writes
MOST_GROUPS = 512  # of a call of PyTorch's grouped_mm, which takes fewer than 1024 on a GPU
EAGER_ELEMENTS = 1 << 30  # experts x all their weights: the gradient for each expert is a tensor of the size of all weights
GATHERED_ELEMENTS = 1 << 27  # weights of every slot, which batched_mm writes

SLOW = ("transformers, batched_mm", "transformers, eager", "dense einsum, weighed first", "dense einsum")

Forward = Callable[[], tuple[Tensor, list[Tensor]]]  # output, and the leaves to differentiate by


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

    @property
    def dense_operations(self) -> float:
        """Additions and multiplications of forward and backward if every expert processes every token."""
        return 6.0 * len(self.x) * (self.up.numel() + self.down.numel())


def case(tokens: int, features: int, experts: int, neurons: int, slots: int, device: str, dtype: torch.dtype = torch.float32) -> Case:
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


def weights_of_all(c: Case) -> Tensor:
    """(N, E), mostly zero."""
    return torch.zeros(len(c.x), len(c.up), dtype=c.weight.dtype, device=c.x.device).scatter_add(1, c.index, c.weight)


def dense_naive(c: Case) -> Tensor:
    """The simplest form; its third product holds tokens x experts x features values."""
    h = gated(torch.einsum("nf,eif->nei", c.x, c.up))
    return torch.einsum("nei,efi,ne->nf", h, c.down, weights_of_all(c))


def dense(c: Case) -> Tensor:
    """The best dense form: three large products. Hidden values are weighted first, so the last product also sums over experts."""
    gate, up = (torch.einsum("nf,eif->nei", c.x, half) for half in c.up.chunk(2, 1))
    return torch.einsum("nei,efi->nf", functional.silu(gate) * up * weights_of_all(c).unsqueeze(-1), c.down)


def loop(c: Case) -> Tensor:
    """A loop over experts. Weights are unbound once: indexing them would create a gradient of full size for each expert."""
    ups, downs = c.up.unbind(), c.down.unbind()
    out = torch.zeros_like(c.x)
    for expert in torch.unique(c.index).tolist():
        token, slot = (c.index == expert).nonzero(as_tuple=True)
        part = functional.linear(gated(functional.linear(c.x[token], ups[expert])), downs[expert])
        out.index_add_(0, token, part * c.weight[token, slot, None])
    return out


def step_over_grouped_mm(c: Case) -> Tensor:
    """Sorts once and differentiates by autograd: the best form that needs no library. Many experts take several calls."""
    flat = c.index.flatten()
    expert, order = flat.sort(stable=True)
    ends = torch.bincount(expert, minlength=len(c.up)).cumsum(0).to(torch.int32)
    parts, begin = [], 0
    for some in torch.arange(len(c.up)).split(MOST_GROUPS):
        experts = slice(int(some[0]), int(some[-1]) + 1)
        stop = len(order) if experts.stop == len(c.up) else int(ends[experts.stop - 1])
        offsets = ends[experts] - begin
        rows = c.x[order[begin:stop] // c.index.shape[1]]
        h = gated(functional.grouped_mm(rows, c.up[experts].mT, offs=offsets))
        parts.append(functional.grouped_mm(h, c.down[experts].mT, offs=offsets))
        begin = stop
    out = (torch.cat(parts) if len(parts) > 1 else parts[0]) * c.weight.flatten()[order, None]
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return out[places].unflatten(0, c.index.shape).sum(1)


def of_transformers(name: str, c: Case) -> Tensor:
    module = SimpleNamespace(
        gate_up_proj=c.up, down_proj=c.down, num_experts=len(c.up), act_fn=functional.silu, has_gate=True, has_bias=False,
        is_transposed=False, is_concatenated=True, has_post_expert_norm=False, _is_expert_parallel=False,
    )  # fmt: skip
    module._apply_gate = lambda pre: _default_apply_gate(module, pre)
    forward = Qwen3MoeExperts.forward.__wrapped__ if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
    return forward(module, c.x, c.index, c.weight)


def liger(c: Case) -> Tensor:
    """Liger's fused mixture, with our weight layout, int32 indices and no unused slots."""
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(c.x, c.up, c.down, c.index.to(torch.int32), c.weight)


def why_no_liger(device: str) -> str | None:
    if device != "cuda":
        return "runs on a GPU alone"
    try:
        from liger_kernel.ops import LigerFusedMoEFunction  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install --no-deps liger-kernel"
    return None


def ours(c: Case, probe: Tensor | None = None) -> Tensor:
    return ops.expert_mlp(c.x, c.up, c.down, c.index, c.weight, surprise=probe)


def forwards_of(c: Case) -> dict[str, Forward]:
    """All candidates that fit this size, ours first."""

    def plain(form: Callable[[Case], Tensor]) -> tuple[Tensor, list[Tensor]]:
        return form(c), c.leaves

    def with_surprise(checkpointed: bool) -> tuple[Tensor, list[Tensor]]:
        probe = torch.zeros(c.index.shape, device=c.x.device, requires_grad=True)
        out = recomputed(ours, c, probe) if checkpointed else ours(c, probe)
        return out, [*c.leaves, probe]

    recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    found: dict[str, Forward] = {
        "expert_mlp, surprise": lambda: with_surprise(False),
        "expert_mlp": lambda: plain(ours),
        "expert_mlp, surprise, checkpointed": lambda: with_surprise(True),
        "expert_mlp, checkpointed": lambda: plain(lambda c: recomputed(ours, c)),
        "step over grouped_mm": lambda: plain(step_over_grouped_mm),
        "transformers, grouped_mm": lambda: plain(partial(of_transformers, "grouped_mm")),
        "loop over experts": lambda: plain(loop),
    }
    weights, device = c.up.numel() + c.down.numel(), c.x.device.type
    if c.index.numel() * weights // len(c.up) <= GATHERED_ELEMENTS:
        found["transformers, batched_mm"] = lambda: plain(partial(of_transformers, "batched_mm"))
    if len(c.up) * c.up.numel() <= EAGER_ELEMENTS:
        found["transformers, eager"] = lambda: plain(partial(of_transformers, "eager"))
    if c.dense_operations <= DENSE_OPERATIONS[device]:
        found["dense einsum, weighed first"] = lambda: plain(dense)
        if c.x.numel() * len(c.up) <= DENSE_ELEMENTS:
            found["dense einsum"] = lambda: plain(dense_naive)
    if why_no_liger(device) is None:
        found["Liger"] = lambda: plain(liger)
    return found


def step(c: Case, forward: Forward) -> tuple[Tensor, ...]:
    """Output, gradients of the leaves, and the surprise if the form computes one."""
    out, leaves = forward()
    return (out.detach(), *torch.autograd.grad(out, leaves, c.cotangent))


def check_close(got: Tensor, wanted: Tensor, tolerance: float, name: str) -> float:
    """RMS error divided by the RMS of `wanted`; NaN fails. Computed in float32, as some gradients hold 10^8 values."""
    ratio = (torch.linalg.vector_norm(got.float() - wanted.float()) / torch.linalg.vector_norm(wanted.float())).item()
    assert ratio <= tolerance, f"{name} must differ by at most {tolerance:g} of its size, got {ratio:.3g}."
    return ratio


def check_equal(outputs: dict[str, tuple[Tensor, ...]], tolerance: float) -> dict[str, float]:
    """Compares outputs and gradients with those of the step over grouped_mm, and surprises with each other; returns the largest errors."""
    errors = dict.fromkeys(outputs, 0.0)
    reference = outputs["step over grouped_mm"]
    surprises = [name for name, values in outputs.items() if len(values) > 5]
    for name, values in outputs.items():
        if values is not reference:
            for part, got, wanted in zip(("output", "x", "up", "down", "weight"), values, reference, strict=False):
                errors[name] = max(errors[name], check_close(got, wanted, tolerance, f"{part} of {name}"))
    for name in surprises[1:]:
        errors[name] = max(errors[name], check_close(outputs[name][5], outputs[surprises[0]][5], tolerance, f"surprise of {name}"))
    return errors


def best_forms(compare: Callable[..., Comparison], device: str, sizes: tuple[int, ...], liger: bool = False) -> None:
    """Compares a step with the fastest peers, and measures the cost of the surprise.

    Liger is a question of its own, because its first step tries 128 configurations, which takes minutes.
    """
    tokens, features, experts, neurons, slots = sizes
    c = case(tokens, features, experts, neurons, slots, device, DTYPE[device])
    ours = ("expert_mlp", "expert_mlp, surprise")
    peers = ("step over grouped_mm", *(["Liger"] if liger else ["transformers, grouped_mm"]))
    forwards = forwards_of(c)
    notes = {"without Liger": why_no_liger(device)} if liger else {}
    notes |= predicted("expert_mlp", sizes) if device == "cuda" else {}
    steps = {name: partial(step, c, forwards[name]) for name in (*ours, *peers) if name in forwards}
    result = compare(
        f"mixture, best forms, {tokens} tokens x {features}, {experts} experts of {neurons}, {slots} a token, {device}",
        steps,
        lambda outputs: check_equal(outputs, TOLERANCE[DTYPE[device]]),
        info={"goal": "best of the others >= 1.3x, surprise <= 3 %", **{name: value for name, value in notes.items() if value}},
        optional=peers[1:],
    )
    result.info["the best of the others"] = round(min(result.ratio(name) for name in peers if name in result.samples), 3)
    result.info["surprise adds %"] = round(100 * (result.ratio(ours[1]) - 1), 2)
    result.info["weights' bytes"] = c.up.nbytes + c.down.nbytes
    result.info["peak MB"] = {name: round(peak_megabytes(steps[name], device)) for name in result.samples}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("size", GPU_SIZES)
def test_best_forms(compare, size, liger):
    best_forms(compare, "cuda", SIZES[size], liger)


@pytest.mark.parametrize("forms", ["sparse", "slow"])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(compare, device, size, forms):
    """Forms that take seconds are compared separately, so that the others have enough rounds."""
    if device == "cpu" and size in GPU_SIZES:
        pytest.skip("minutes on a CPU; `make gpu` runs it")
    tokens, features, experts, neurons, slots = SIZES[size]
    c = case(tokens, features, experts, neurons, slots, device, DTYPE[device])
    goals = {
        "128 experts of 64, cpu": "dense >= 50x, loop >= 20x, grouped_mm >= 0.9x",
        "1024 experts of 64, 16k tokens, cuda": "best of grouped_mm and Liger >= 1.3x, surprise <= 3 %",
    }
    candidates = {name: partial(step, c, forward) for name, forward in forwards_of(c).items()}
    slow = [name for name in candidates if name in SLOW]
    if forms == "sparse":
        candidates = {name: call for name, call in candidates.items() if name not in slow}
    elif not slow:
        pytest.skip("all of them cost too much at this size")
    else:
        candidates = {name: candidates[name] for name in ("expert_mlp, surprise", "expert_mlp", "step over grouped_mm", *slow)}
    notes = {"goal": goals.get(f"{size}, {device}"), "without Liger:": why_no_liger(device)}
    notes |= predicted("expert_mlp", SIZES[size]) if device == "cuda" else {}
    kind = str(DTYPE[device]).removeprefix("torch.")
    compare(
        f"mixture, {forms} forms, {tokens} tokens x {features}, {experts} experts of {neurons}, {slots} a token, {kind}, {device}",
        candidates,
        lambda outputs: check_equal(outputs, TOLERANCE[DTYPE[device]]),
        info={name: value for name, value in notes.items() if value},
    )


def allocated(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """Peak of the bytes allocated during one call, and bytes that its result keeps alive."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = call()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    tensors = [held] if isinstance(held, Tensor) else [part for part in held if isinstance(part, Tensor)]
    results = sum({part.data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values())
    unseen = max(0, results - now)  # memory that the op maps itself, as `expert_mlp` does for large gradients, has no allocation event
    return most + unseen, now + unseen


@pytest.mark.parametrize("size", [next(iter(SIZES))])
def test_memory(compare, device, size):
    """Peak memory of forward and backward, gradients included, and memory that forward keeps for backward; nothing is timed."""
    c = case(*SIZES[size], device, DTYPE[device])
    peak, kept = {}, {}
    for name, forward in forwards_of(c).items():
        peak[name] = round(allocated(partial(step, c, forward), device)[0] / 1e6)
        kept[name] = round(allocated(forward, device)[1] / 1e6)
    ours = partial(step, c, forwards_of(c)["expert_mlp"])
    compare(f"mixture, memory, {size}, {device}", {"expert_mlp": ours}, rounds=1, info={"peak MB": peak, "kept MB": kept})
    assert peak["expert_mlp, surprise"] <= peak["expert_mlp"] * 1.05
    assert peak["expert_mlp"] <= peak["step over grouped_mm"] * 1.25
    assert kept["expert_mlp, checkpointed"] <= kept["expert_mlp"]
