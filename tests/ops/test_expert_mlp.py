"""`expert_mlp` and its gradients against every expert for every token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL_IMPLS
from tinyonn.testing import assert_close_rms, impl_device

from .expert_cases import IMPLS, LAYOUTS, leaves_of, routing, tokens_of, weights


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("clamped_swiglu", [(1 - 7) * 7 / (1 + math.exp(-1.702 * 7)), (1 - 6.5) * 6.5 / (1 + math.exp(-1.702 * 6.5))]),
        ("clamped_silu", [-10 * 10 / (1 + math.exp(-10)), -6.5 * 6.5 / (1 + math.exp(-6.5))]),
    ],
)
def test_activations_clamp_at_7_and_at_10_unless_told(activation, expected, impl):
    """One neuron of gate x and up -x, at x of 20 and of 6.5."""
    x, gate_up_proj = torch.tensor([[20.0], [6.5]], dtype=torch.float64), torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    one, first = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long)
    out = ops.expert_mlp(x, gate_up_proj, one, first, one[0].expand(2, 1), activation=activation, impl=impl)
    assert out.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradcheck(layout):
    params = weights(3, 2, 4, layout=layout, biased=True)
    x, (index, weight) = tokens_of(5, 4), routing(5, 2, 3)
    names = [name for name, value in params.items() if value is not None]

    def call(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        return ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **dict(zip(names, values, strict=True)), **layout)

    assert torch.autograd.gradcheck(call, leaves_of(x, weight, *params.values()))


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


def test_forward_mode_is_refused_not_taken_for_zero():
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)

    def call(x: Tensor, weight: Tensor, impl: str = "torch") -> Tensor:
        return ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, impl=impl, **params)

    for inputs in ((torch.ones_like(x), torch.zeros_like(weight)), (torch.zeros_like(x), torch.ones_like(weight))):
        with pytest.raises(RuntimeError, match="expert_mlp does not support forward-mode differentiation"):
            torch.func.jvp(call, (x, weight), inputs)
        _, tangent = torch.func.jvp(lambda *args: call(*args, impl="reference"), (x, weight), inputs)
        assert tangent.norm() > 0
    # A tangent that reaches backward alone.
    x.requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        cotangent = torch.autograd.forward_ad.make_dual(torch.ones_like(x), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="expert_mlp does not support forward-mode differentiation"):
            torch.autograd.grad(call(x, weight), x, cotangent)


def test_second_derivatives_are_refused():
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6).requires_grad_(), routing(9, 3, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
    out = ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, **params)
    for grad in torch.autograd.grad(out.sin().sum(), [x, probe], create_graph=True):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward(retain_graph=True)


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
