"""`expert_mlp` against every expert for every token in float64, and its surprise against one backward a token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL_IMPLS
from tinyonn.testing import assert_close_rms, impl_device

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


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_output_and_gradients_are_exact(layout, biased):
    params = weights(5, 6, 7, layout=layout, biased=biased)
    x, (index, weight) = tokens_of(23, 7), routing(23, 3, 5)
    leaves = leaves_of(x, weight, *params.values())
    cotangent = tokens_of(23, 7).flip(0)
    results = []
    for function, options in ((reference.expert_mlp, {}), (ops.expert_mlp, {"impl": "torch"})):
        out = function(x, top_k_index=index, top_k_weights=weight, **params, **layout, **options)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradcheck(layout):
    params = weights(3, 2, 4, layout=layout, biased=True)
    x, (index, weight) = tokens_of(5, 4), routing(5, 2, 3)
    names = [name for name, value in params.items() if value is not None]

    def call(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        return ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **dict(zip(names, values, strict=True)), **layout)

    assert torch.autograd.gradcheck(call, leaves_of(x, weight, *params.values()))


def brute_force(x, index, weight, params, layout, grad_out, kind: str) -> Tensor:
    """(N, E) by one backward of the reference for each token, per expert; infinite where it did not go."""
    experts = len(params["gate_up_proj"])
    found = torch.full((len(x), experts), math.inf, dtype=torch.float64)
    chosen = ("down_proj",) if kind == "down_proj" else tuple(name for name, value in params.items() if value is not None)
    for token in range(len(x)):
        leaves = {name: params[name].detach().clone().requires_grad_() for name in chosen}
        row = slice(token, token + 1)
        out = reference.expert_mlp(x[row], top_k_index=index[row], top_k_weights=weight[row], **{**params, **leaves}, **layout)
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out[row].double())
        for expert in set(index[token].tolist()) - {experts}:
            found[token, expert] = math.sqrt(sum(grad[expert].square().sum().item() for grad in grads))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["down_proj", "expert"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_surprise_equals_one_backward_a_token(name, biased, kind, impl):
    layout = LAYOUTS[name]
    params = weights(4, 5, 6, layout=layout, biased=biased)
    x, (index, weight) = tokens_of(9, 6), routing(9, 3, 4)
    index[0, :2] = 1  # an expert named twice counts with its summed weight
    weight[0, :2] = torch.tensor([0.7, -0.2])
    index[1] = 4  # a token without an expert
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind=kind, impl=impl, **params, **layout)
    cotangent = tokens_of(9, 6).flip(0)
    (slots,) = torch.autograd.grad(out, probe, cotangent)
    expected = brute_force(x, index, weight, params, layout, cotangent, kind)
    torch.testing.assert_close(ops.scatter_surprise(slots, index, 4), expected, rtol=1e-10, atol=1e-12)
    assert (slots[index == 4] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_surprise_of_the_output_is_weight_times_gradient(impl):
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind="output", impl=impl, **params)
    cotangent = tokens_of(9, 6).flip(0)
    (slots,) = torch.autograd.grad(out, probe, cotangent)
    torch.testing.assert_close(slots, weight * cotangent.norm(dim=-1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("experts", "neurons", "features", "tokens", "slots"),
    [(1, 8, 16, 5, 1), (8, 8, 60, 1, 8), (64, 13, 17, 100, 4), (4096, 8, 16, 50, 8), (3, 768, 24, 20, 2), (16, 64, 32, 300, 16),
     (4, 1, 1, 7, 3)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_size_in_working_precision(experts, neurons, features, tokens, slots, dtype):
    params = weights(experts, neurons, features, dtype=dtype)
    x, (index, weight) = tokens_of(tokens, features, dtype), routing(tokens, slots, experts, dtype=dtype)
    cotangent = tokens_of(tokens, features, dtype).flip(0)
    probe = torch.zeros(index.shape, requires_grad=True)
    leaves = leaves_of(x, weight, *params.values())
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind="expert", **params)
    grads = torch.autograd.grad(out, [*leaves, probe], cotangent)
    wide = {name: None if value is None else value.detach().double().requires_grad_() for name, value in params.items()}
    wide_x, wide_weight = (value.detach().double().requires_grad_() for value in (x, weight))
    expected = reference.expert_mlp(wide_x, top_k_index=index, top_k_weights=wide_weight, **wide)
    expected_grads = torch.autograd.grad(expected, leaves_of(wide_x, wide_weight, *wide.values()), cotangent.double())
    surprise = reference.expert_surprise(x, top_k_index=index, top_k_weights=weight, grad_output=cotangent, kind="expert", **params)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close_rms(out, expected.detach(), limit)
    for got, wanted in zip(grads[:-1], expected_grads, strict=True):
        assert_close_rms(got, wanted, limit)
    used = surprise > 0
    error = (grads[-1].double() - surprise)[used].abs() / surprise[used]
    assert error.square().mean().sqrt() <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_all_tokens_to_one_expert():
    params, x = weights(6, 4, 8), tokens_of(40, 8)
    index = torch.full((40, 2), 6)
    index[:, 1] = 3
    weight = torch.ones(40, 2, dtype=torch.float64)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **params)
    one = {name: None if value is None else value[3:4] for name, value in params.items()}
    expected = reference.expert_mlp(x, top_k_index=torch.zeros(40, 1, dtype=torch.long), top_k_weights=weight[:, :1], **one)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2), (4, 0), (4, 2)], ids=["no-tokens", "no-slots", "all-unused"])
def test_nothing_to_do_gives_zeros(shape, impl):
    params, x = weights(3, 4, 8), tokens_of(shape[0], 8).requires_grad_()
    index, weight = torch.full(shape, 3), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    probe = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    leaves = leaves_of(*params.values())
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, impl=impl, **params)
    assert out.shape == x.shape
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), [x, weight, probe, *leaves], materialize_grads=True):
        assert (grad == 0).all()


def test_unused_slots_cost_nothing_and_hold_nothing(monkeypatch):
    """Rows of a sentinel never reach a product, whatever their weight."""
    seen = []
    original = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kwargs: seen.append(len(args[0])) or original(*args, **kwargs))
    params, x = weights(4, 8, 16, dtype=torch.float32), tokens_of(10, 16, torch.float32)
    index, weight = routing(10, 4, 4, unused=0.6, dtype=torch.float32)
    weight[index == 4] = math.nan
    probe = torch.zeros(index.shape, requires_grad=True)
    leaves = leaves_of(x, weight, *params.values())
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, **params)
    assert seen == [int((index < 4).sum())] * 2
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (probe, *leaves) if leaf.grad is not None)


@pytest.mark.parametrize("rows", [1, 7, 20])
@pytest.mark.parametrize(("name", "kind"), [("silu", "down_proj"), ("gelu-tanh", "expert"), ("gpt-oss", "expert")])
def test_chunks_of_experts_change_nothing(name, kind, rows, monkeypatch):
    """Experts without a token lie first, last and between."""
    from tinyonn.ops.experts import _torch_experts

    layout = LAYOUTS[name]
    params, x = weights(9, 4, 8, layout=layout, biased=True), tokens_of(40, 8)
    index = torch.tensor([1, 2, 5, 7])[torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(1))]
    weight = torch.rand(40, 3, dtype=torch.float64)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    leaves = [*leaves_of(x, weight, *params.values()), probe]

    def step() -> list[Tensor]:
        out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind=kind, **params, **layout)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    wanted = step()
    monkeypatch.setattr(_torch_experts, "CHUNK_ELEMENTS", rows * 8)
    for got, value in zip(step(), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)


STRIDES = {
    "rows-expanded": lambda x: x[:, :1].expand(x.shape),
    "columns-expanded": lambda x: x[..., :1].expand(x.shape),
    "experts-expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.mT.contiguous().mT,
    "not-aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (x.shape[1] * x.shape[2] // 2, 8, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STRIDES)
def test_weights_may_have_any_strides(name, dtype):
    params, x = weights(4, 8, 16, dtype=dtype), tokens_of(12, 16, dtype)
    index, weight = routing(12, 2, 4, dtype=dtype)
    params |= {key: STRIDES[name](params[key]) for key in ("gate_up_proj", "down_proj")}
    leaves = leaves_of(x, weight, params["gate_up_proj"].detach(), params["down_proj"].detach())
    params |= {"gate_up_proj": leaves[2], "down_proj": leaves[3]}
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **params)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.expert_mlp(wide[0], wide[2], wide[3], index, wide[1])
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close_rms(out, expected.detach(), limit)
    cotangent = tokens_of(12, 16, dtype).flip(0)
    grads = torch.autograd.grad(out, leaves, cotangent)
    for got, wanted in zip(grads, torch.autograd.grad(expected, wide, cotangent.double()), strict=True):
        assert_close_rms(got, wanted, limit)


def probe_pair(call: Any, x: Tensor, index: Tensor) -> Tensor:
    probe = torch.zeros(index.shape, requires_grad=True)
    call(x, probe).square().sum().backward()
    assert probe.grad is not None
    return probe.grad


@pytest.fixture
def layer():
    params = weights(6, 8, 16, dtype=torch.float32)
    x, (index, weight) = tokens_of(30, 16, torch.float32), routing(30, 3, 6, dtype=torch.float32)

    def call(x: Tensor, probe: Tensor) -> Tensor:
        return ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, **params)

    return call, x, index


def test_the_probe_works_under_compilation(layer):
    call, x, index = layer
    torch.testing.assert_close(probe_pair(torch.compile(call, fullgraph=True), x, index), probe_pair(call, x, index))


def test_the_probe_works_under_checkpointing(layer):
    call, x, index = layer
    checked = probe_pair(lambda x, probe: checkpoint(call, x, probe, use_reentrant=False), x, index)
    assert torch.equal(checked, probe_pair(call, x, index))


def test_two_calls_in_one_graph_have_their_own_surprise(layer):
    call, x, index = layer
    first, second = (torch.zeros(index.shape, requires_grad=True) for _ in range(2))
    middle = call(x, first)
    call(middle, second).square().sum().backward()
    (wanted,) = torch.autograd.grad(call(middle.detach(), probe := torch.zeros_like(second, requires_grad=True)).square().sum(), probe)
    assert torch.equal(second.grad, wanted)
    assert not torch.equal(first.grad, second.grad)


def test_a_retained_graph_gives_the_surprise_again(layer):
    call, x, index = layer
    probe = torch.zeros(index.shape, requires_grad=True)
    loss = call(x, probe).square().sum()
    (first,) = torch.autograd.grad(loss, probe, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, probe)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_probe_that_would_get_no_gradient_is_refused(impl):
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="surprise does not require grad, but its gradient is the surprise"):
        ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, impl=impl, **params)
    with torch.no_grad():
        ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, impl=impl, **params)


def test_forward_mode_is_refused_not_taken_for_zero():
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)

    def call(x: Tensor, weight: Tensor, impl: str = "torch") -> Tensor:
        return ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, impl=impl, **params)

    for inputs in ((torch.ones_like(x), torch.zeros_like(weight)), (torch.zeros_like(x), torch.ones_like(weight))):
        with pytest.raises(RuntimeError, match="expert_mlp must be differentiated by reverse mode, got a forward-mode tangent"):
            torch.func.jvp(call, (x, weight), inputs)
        _, tangent = torch.func.jvp(lambda *args: call(*args, impl="reference"), (x, weight), inputs)
        assert tangent.norm() > 0
    # A tangent that reaches backward alone.
    x.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        cotangent = torch.autograd.forward_ad.make_dual(torch.ones_like(x), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="expert_mlp must be differentiated by reverse mode"):
            torch.autograd.grad(call(x, weight), x, cotangent)


def test_second_derivatives_are_refused():
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6).requires_grad_(), routing(9, 3, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, **params)
    for grad in torch.autograd.grad(out.sin().sum(), [x, probe], create_graph=True):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["silu", "gpt-oss", "relu2"])
def test_every_kind_of_surprise_in_bfloat16(name, kind):
    layout = LAYOUTS[name]
    params = weights(8, 24, 40, layout=layout, biased=True, dtype=torch.bfloat16)
    x, (index, weight) = tokens_of(60, 40, torch.bfloat16), routing(60, 3, 8, dtype=torch.bfloat16)
    cotangent, probe = tokens_of(60, 40, torch.bfloat16).flip(0), torch.zeros(index.shape, requires_grad=True)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind=kind, **params, **layout)
    (found,) = torch.autograd.grad(out, probe, cotangent)
    wanted = reference.expert_surprise(
        x, top_k_index=index, top_k_weights=weight, grad_output=cotangent, kind=kind, **params, **layout
    )  # fmt: skip
    used = wanted > 0
    assert ((found.double() - wanted)[used] / wanted[used]).square().mean().sqrt() <= 5e-3
    assert (found[~used] == 0).all()


def test_without_a_probe_nothing_is_added(layer, monkeypatch):
    from tinyonn.ops.experts import _torch_experts

    monkeypatch.setattr(_torch_experts, "row_norms", lambda *args: pytest.fail("no surprise was asked for"))
    call, x, _ = layer
    call(x.requires_grad_(), None).sum().backward()


def test_gradients_of_many_experts_are_not_held_twice(monkeypatch):
    from tinyonn.ops.experts import _torch_experts

    sizes = []
    original = torch.nn.functional.grouped_mm

    def product(*args: Any, **kwargs: Any) -> Tensor:
        found = original(*args, **kwargs)
        if found.dim() == 3:
            sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", product)
    params, x = weights(1024, 32, 64, dtype=torch.float32), tokens_of(20, 64, torch.float32)
    leaves = leaves_of(x, *params.values())
    index, weight = routing(20, 4, 1024, dtype=torch.float32)
    grads = torch.autograd.grad(ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **params).sum(), leaves)
    assert max(sizes) <= _torch_experts.GRADIENT_ELEMENTS < grads[1].numel()
    assert sum(sizes) == grads[1].numel() + grads[2].numel()


NEEDED = ["hidden_states", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias", "top_k_weights"]


@pytest.mark.parametrize("impl", ["torch", ALL_IMPLS[1]])
@pytest.mark.parametrize("needed", [*([name] for name in NEEDED), ["hidden_states", "down_proj"], ["surprise"]], ids="-".join)
def test_only_gradients_that_are_asked_for_are_computed(needed, impl, monkeypatch):
    from tinyonn.ops.experts import _torch_experts

    products = []
    for name in ("grouped", "outer_into"):
        original = getattr(_torch_experts, name)
        monkeypatch.setattr(_torch_experts, name, lambda *args, f=original, name=name: products.append(name) or f(*args))
    device, dtype = impl_device(impl), torch.float32
    params = weights(4, 6, 8, biased=True, dtype=dtype)
    x, (index, weight) = tokens_of(9, 8, dtype), routing(9, 2, 4, dtype=dtype)
    tensors = {"hidden_states": x, "top_k_weights": weight, "surprise": torch.zeros(9, 2), **params}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def gradients(names: list[str], impl: str) -> list[Tensor]:
        leaves = {name: tensor.detach().clone().requires_grad_(name in names) for name, tensor in tensors.items()}
        if "surprise" not in names:
            del leaves["surprise"]
        out = ops.expert_mlp(**leaves, top_k_index=index.to(device), impl=impl)
        return list(torch.autograd.grad(out.sin().sum(), [leaves[name] for name in names]))

    found = gradients(needed, impl)
    made = list(products)
    whole = dict(zip(["surprise", *NEEDED], gradients(["surprise", *NEEDED], impl), strict=True))
    for name, grad in zip(needed, found, strict=True):
        assert torch.equal(grad, whole[name])
    if impl == "torch":
        sides = ("gate_up_proj" in needed or "gate_up_bias" in needed) + ("down_proj" in needed or "down_bias" in needed)
        assert made.count("outer_into") == sides
        assert made.count("grouped") == 3 + ("hidden_states" in needed)


def test_two_runs_give_the_same_bits(layer):
    call, x, index = layer
    assert torch.equal(probe_pair(call, x, index), probe_pair(call, x, index))


def test_an_exported_call_takes_any_number_of_tokens():
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            params = weights(6, 8, 16, dtype=torch.float32)
            self.gate_up_proj, self.down_proj = (torch.nn.Parameter(params[name]) for name in ("gate_up_proj", "down_proj"))

        def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            return ops.expert_mlp(x, self.gate_up_proj, self.down_proj, index, weight)

    def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return tokens_of(tokens, 16, torch.float32), *routing(tokens, 3, 6, dtype=torch.float32)

    model, tokens = Mixture(), torch.export.Dim("tokens")
    exported = torch.export.export(model, inputs(9), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})).module()
    for number in (2, 30):
        assert torch.equal(exported(*inputs(number)), model(*inputs(number)))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_opcheck(biased):
    params = weights(4, 3, 8, biased=biased)
    x, (index, weight) = tokens_of(7, 8), routing(7, 2, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    leaves_of(x, weight, *params.values())
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    up, down, up_bias, down_bias = (params[name] for name in names)
    torch.library.opcheck(
        torch.ops.tinyonn.expert_mlp.default,
        (x, up, down, index, weight, up_bias, down_bias, probe, "expert", "silu", True, False, False, 0.0, "auto"),
    )


def test_scatter_surprise_is_infinite_where_a_token_did_not_go():
    index = torch.tensor([[2, 0], [3, 3], [1, 3]])
    found = ops.scatter_surprise(torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 0.0]]), index, 3)
    assert found.tolist() == [[2.0, math.inf, 1.0], [math.inf] * 3, [math.inf, 5.0, math.inf]]
    torch.testing.assert_close(found, reference.scatter_surprise(torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 0.0]]), index, 3))


@pytest.mark.parametrize(
    ("slots", "index", "experts", "error", "message"),
    [
        (torch.ones(4, 2), torch.zeros(4, 2), 3, TypeError, "top_k_index must be an int32 or int64 tensor, got torch.float32"),
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.long, device="meta"), 3, ValueError, "top_k_index must be on cpu, got meta"),
        (torch.ones(4, 2, dtype=torch.long), torch.zeros(4, 2, dtype=torch.long), 3, TypeError, "slots must be float16"),
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.long), -1, ValueError, "num_experts must be an int of at least 0, got -1"),
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.long), 2.0, ValueError, "num_experts must be an int of at least 0, got 2.0"),
        (torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.long), 3, ValueError, "slots must have the shape"),
    ],
)
def test_what_cannot_be_scattered_is_named(slots, index, experts, error, message):
    with pytest.raises(error, match=message):
        ops.scatter_surprise(slots, index, experts)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "3-d tokens": ({"hidden_states": torch.zeros(1, 4, 8)}, ValueError, r"hidden_states must have shape \(N, F\)"),
    "other features": ({"hidden_states": torch.zeros(4, 9)}, ValueError, r"gate_up_proj must have shape \(E, ·, 9\)"),
    "odd gate": ({"gate_up_proj": torch.zeros(3, 5, 8)}, ValueError, "even number of outputs"),
    "other neurons": ({"down_proj": torch.zeros(3, 8, 7)}, ValueError, r"down_proj must have shape \(3, 8, 4\)"),
    "other dtype": ({"down_proj": torch.zeros(3, 8, 4, dtype=torch.float64)}, TypeError, "down_proj must be torch.float32"),
    "other device": ({"down_proj": torch.zeros(3, 8, 4, device="meta")}, ValueError, "down_proj must be on cpu"),
    "float index": ({"top_k_index": torch.zeros(4, 2)}, TypeError, "top_k_index must be an int32 or int64"),
    "other tokens": ({"top_k_index": torch.zeros(5, 2, dtype=torch.long)}, ValueError, r"top_k_index must have shape \(4, K\)"),
    "other slots": ({"top_k_weights": torch.zeros(4, 3)}, ValueError, r"top_k_weights must have shape \(4, 2\)"),
    "bias": ({"gate_up_bias": torch.zeros(3, 4)}, ValueError, r"gate_up_bias must have shape \(3, 8\)"),
    "probe": ({"surprise": torch.zeros(4, 3)}, ValueError, r"surprise must have shape \(4, 2\)"),
    "probe dtype": ({"surprise": torch.zeros(4, 2, dtype=torch.bfloat16)}, TypeError, "surprise must be torch.float32"),
    "activation": ({"activation": "swish"}, ValueError, "activation must be one of silu"),
    "limit of silu": ({"limit": 7.0}, ValueError, "limit must be None with activation='silu', which has no clamp, got 7.0"),
    "limit 0": ({"activation": "clamped_silu", "limit": 0}, ValueError, "limit must be above 0 and finite, got 0"),
    "limit of another type": ({"activation": "clamped_silu", "limit": "7"}, TypeError, "limit must be a number, got str"),
    "kind": ({"surprise_kind": "up_proj"}, ValueError, "surprise_kind must be one of down_proj"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    good = {
        "hidden_states": torch.zeros(4, 8),
        "gate_up_proj": torch.zeros(3, 8, 8),
        "down_proj": torch.zeros(3, 8, 4),
        "top_k_index": torch.zeros(4, 2, dtype=torch.long),
        "top_k_weights": torch.zeros(4, 2),
    }
    change, error, message = BAD[name]
    ops.expert_mlp(**good)
    with pytest.raises(error, match=message):
        ops.expert_mlp(**{**good, **change})


@pytest.mark.parametrize("impl", IMPLS)
def test_an_index_out_of_range_is_named_in_debug_and_unused_otherwise(impl):
    params, x = weights(3, 4, 8), tokens_of(2, 8)
    index, weight = torch.tensor([[0, 7], [-1, 2]]), torch.ones(2, 2, dtype=torch.float64)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, impl=impl, **params)
    safe = index.masked_fill((index < 0) | (index > 3), 3)
    torch.testing.assert_close(out, reference.expert_mlp(x, top_k_index=safe, top_k_weights=weight, **params))
    with tinyonn.debug(), pytest.raises(ValueError, match="top_k_index must be 0 … 3, 3 for an unused slot, got 7 for token 0"):
        ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, impl=impl, **params)
    with tinyonn.debug(), pytest.raises(ValueError, match="top_k_weights must not contain NaN"):
        ops.expert_mlp(x, top_k_index=safe, top_k_weights=weight * math.nan, impl=impl, **params)


@pytest.mark.parametrize("impl", ["torch", "reference", ALL_IMPLS[1]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("of_tokens", "of_gradients"), [(1e20, 1e20), (1e25, 1.0), (1.0, 1e30), (1e-25, 1.0), (1.0, 1e-30), (1e-3, 1e35)])
def test_surprise_has_the_range_of_float32(of_tokens, of_gradients, kind, impl):
    """Squares of its parts have not. The oracle computes in float64; what is beyond float32 is its largest value, never infinite."""
    device = impl_device(impl)
    params = weights(4, 8, 16, layout={"gated": False}, dtype=torch.float32)
    x, (index, weight) = tokens_of(9, 16, torch.float32) * of_tokens, routing(9, 2, 4, dtype=torch.float32)
    cotangent = tokens_of(9, 16, torch.float32).flip(0) * of_gradients
    options = {"gated": False, "activation": "gelu"}
    named = {name: None if value is None else value.to(device) for name, value in params.items()}
    probe = torch.zeros(index.shape, device=device, requires_grad=True)
    out = ops.expert_mlp(
        x.to(device), top_k_index=index.to(device), top_k_weights=weight.to(device), surprise=probe, surprise_kind=kind, impl=impl,
        **named, **options,
    )  # fmt: skip
    (found,) = torch.autograd.grad(out, probe, cotangent.to(device))
    exact = reference.expert_surprise(x, top_k_index=index, top_k_weights=weight, grad_output=cotangent, kind=kind, **params, **options)
    wanted = exact.clamp(max=torch.finfo(torch.float32).max)
    assert found.isfinite().all()
    used = index < 4
    assert (found.cpu()[~used] == 0).all()
    torch.testing.assert_close(found.cpu()[used].double(), wanted[used], rtol=1e-3, atol=1e-44)


@pytest.mark.parametrize("impl", ["torch", "reference", ALL_IMPLS[1]])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_changes_no_other(value, name, impl):
    """NaN or infinity out for it alone, as of a dense layer; gradients of other tokens, and of experts it did not go to, as without it."""
    layout, device = LAYOUTS[name], impl_device(impl)
    params = weights(5, 6, 8, layout=layout, biased=True, dtype=torch.float32)
    x, (index, weight) = tokens_of(9, 8, torch.float32), routing(9, 2, 5, unused=0, dtype=torch.float32)
    index[3] = torch.tensor([4, 5])
    index = torch.where((index == 4) & (torch.arange(9) != 3).unsqueeze(-1), 5, index)
    others = [token for token in range(9) if token != 3]
    results = []
    for element in (0.5, value):
        x = x.clone()
        x[3] = element
        leaves = [x.to(device).requires_grad_(), weight.to(device).requires_grad_()]
        named = {key: x.detach().clone().to(device).requires_grad_() for key, x in params.items() if x is not None}
        probe = torch.zeros(index.shape, device=device, requires_grad=True)
        out = ops.expert_mlp(leaves[0], top_k_index=index.to(device), top_k_weights=leaves[1], surprise=probe, impl=impl, **named, **layout)
        cotangent = torch.ones_like(out)
        grads = torch.autograd.grad(out, [*leaves, probe, *named.values()], cotangent)
        results.append([out[others], *(grad[others] for grad in grads[:3])])
        if impl != "reference":  # which computes every expert for every token
            results[-1] += [grad[:4] for grad in grads[3:]]
        if math.isnan(element):
            assert out[3].isnan().all()
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
