"""The surprise of `expert_mlp` against one backward a token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL_IMPLS
from tinyonn.testing import impl_device

from .expert_cases import IMPLS, KINDS, LAYOUTS, routing, tokens_of, weights


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_is_what_the_loss_rises_by_without_the_pair(name, biased, impl):
    """Brute force: the loss with and without each pair. Exact for a loss that is linear in the output; for another one, to first order."""
    layout = LAYOUTS[name]
    params = weights(4, 5, 6, layout=layout, biased=biased)
    x, (index, weight) = tokens_of(9, 6), routing(9, 3, 4)
    index[1] = 4  # a token without an expert
    target, slope = tokens_of(9, 6).flip(0), tokens_of(9, 6).flip(1)

    def out_of(weight: Tensor) -> Tensor:
        return reference.expert_mlp(x, top_k_index=index, top_k_weights=weight, **params, **layout)

    losses = {"linear": lambda out: (out * slope).sum(), "squared": lambda out: (out - target).square().sum()}
    for kind, loss in losses.items():
        probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
        options = {"surprise": probe, "surprise_kind": "saving", "impl": impl}
        loss(ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, **options, **params, **layout)).backward()
        assert (probe.grad < 0).any()
        assert (probe.grad > 0).any()
        for token, slot in (index < 4).nonzero().tolist():
            # All of the pair's weight is taken away, or a little of it is taken and given: exact for squares.
            shares = (0.0, 1.0) if kind == "linear" else (1 - 1e-4, 1 + 1e-4)
            less, more = weight.clone(), weight.clone()
            less[token, slot] *= shares[0]
            more[token, slot] *= shares[1]
            rise = (loss(out_of(less)) - loss(out_of(more))).item() / (shares[1] - shares[0])
            saving = probe.grad[token, slot].item() * weight[token, slot].item()
            assert saving == pytest.approx(rise, rel=1e-7, abs=1e-9)
        assert (probe.grad[index == 4] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_saving_of_an_expert_named_twice_does_not_depend_on_its_weights(impl):
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)
    index[0] = torch.tensor([1, 1, 2])
    found = []
    for given in (weight, weight.flip(0)):
        probe = torch.zeros(index.shape, dtype=torch.float64, requires_grad=True)
        out = ops.expert_mlp(x, top_k_index=index, top_k_weights=given, surprise=probe, surprise_kind="saving", impl=impl, **params)
        (slots,) = torch.autograd.grad(out, probe, tokens_of(9, 6).flip(0))
        found.append(slots)
    torch.testing.assert_close(*found)
    assert found[0][0, 0] == found[0][0, 1] != 0


def test_a_saving_beyond_float32_is_finite():
    params, x, (index, weight) = (
        weights(4, 5, 6, dtype=torch.float32),
        tokens_of(9, 6, torch.float32),
        routing(9, 3, 4, dtype=torch.float32),
    )
    probe = torch.zeros(index.shape, requires_grad=True)
    out = ops.expert_mlp(1e4 * x, top_k_index=index, top_k_weights=weight, surprise=probe, surprise_kind="saving", **params)
    (slots,) = torch.autograd.grad(out, probe, 1e37 * tokens_of(9, 6, torch.float32).sign())
    assert not slots.isinf().any()
    assert (slots.abs() == torch.finfo(torch.float32).max).any()


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


def test_two_runs_give_the_same_bits(layer):
    call, x, index = layer
    assert torch.equal(probe_pair(call, x, index), probe_pair(call, x, index))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_probe_that_would_get_no_gradient_is_refused(impl):
    params, x, (index, weight) = weights(4, 5, 6), tokens_of(9, 6), routing(9, 3, 4)
    probe = torch.zeros(index.shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="surprise does not require grad, but its gradient is the surprise"):
        ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, impl=impl, **params)
    with torch.no_grad():
        ops.expert_mlp(x, top_k_index=index, top_k_weights=weight, surprise=probe, impl=impl, **params)


def test_without_a_probe_nothing_is_added(layer, monkeypatch):
    from tinyonn.ops.experts import _torch_experts

    monkeypatch.setattr(_torch_experts, "row_norms", lambda *args: pytest.fail("no surprise was asked for"))
    call, x, _ = layer
    call(x.requires_grad_(), None).sum().backward()


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
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.long), -1, ValueError, "num_experts must be at least 0, got -1"),
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.long), 2.0, TypeError, "num_experts must be an int, got float"),
        (torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.long), 3, ValueError, "slots must have the shape"),
    ],
)
def test_what_cannot_be_scattered_is_named(slots, index, experts, error, message):
    with pytest.raises(error, match=message):
        ops.scatter_surprise(slots, index, experts)
