"""DynNSA against the dense oracle: values, and every gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import TOLERANCE, assert_close_rms, dtype_id, dyn_nsa_case

from .dyn_nsa_cases import partly_open

RULES = ["share", "relative"]


@pytest.mark.parametrize("importance", RULES)
@pytest.mark.parametrize("compress_size", [16, 32, 64])
@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
def test_every_gradient_is_exact(compress_size, detach_scores, importance):
    """Through the whole function, tau given, against autograd through the dense formula."""
    tensors = dyn_nsa_case(compress_size=compress_size, importance=importance)
    options = {"compress_size": compress_size, "window": 40, "temperature": 1.5, "max_blocks": 8}
    options |= {"detach_scores": detach_scores, "importance": importance}
    assert partly_open(tensors, options) >= 0.2
    tau = torch.rand(1, 330, 2, dtype=torch.float64)
    grads, outputs = [], []
    for function in (ops.dyn_nsa, reference.dyn_nsa):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        result = function(**leaves, tau=tau, **options)
        out, soft = result.out, result.soft_counts
        generator = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
        loss = loss + (soft * torch.randn(soft.shape, generator=generator, dtype=torch.float64)).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
        outputs.append((out, soft))
    for name, ours, theirs in zip(("out", "soft_counts"), *outputs, strict=True):
        assert_close_rms(ours, theirs, 1e-12, name)
    for name, ours, theirs in zip(tensors, *grads, strict=True):
        assert theirs.abs().max() > 0
        assert_close_rms(ours, theirs, 1e-11, f"gradient of {name}")


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_tau_is_a_signal(impl):
    """Computed here or handed in, the same gradients: none flows into it."""
    tensors = dyn_nsa_case(compress_size=32)
    options = {"compress_size": 32, "window": 40, "max_blocks": 8, "impl": impl}
    grads, tau = [], None
    for _ in range(2):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        result = ops.dyn_nsa(**leaves, tau=tau, **options)
        tau = result.tau.detach()
        grads.append(torch.autograd.grad(result.out.square().sum() + result.soft_counts.sum(), list(leaves.values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("importance", RULES)
def test_gradcheck(importance):
    sizes = {"tokens": 84, "heads": 2, "kv_heads": 1, "dim": 3, "queries": 20, "compress_size": 16, "seed": 3, "sharpness": 6.0}
    tensors = {name: tensor.requires_grad_() for name, tensor in dyn_nsa_case(**sizes, importance=importance).items()}
    options = {"block_size": 16, "compress_size": 16, "window": 7, "max_blocks": 5, "temperature": 2.0, "importance": importance}
    tau = torch.rand(1, 20, 1, dtype=torch.float64)
    assert partly_open({k: v.detach() for k, v in tensors.items()}, options) >= 0.2

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.dyn_nsa(*leaves, tau=tau, **options)
        return result.out, result.soft_counts

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("importance", RULES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (8, 2), (8, 1), (16, 1)], ids=lambda v: str(v))
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 507])
def test_any_group_and_length(tokens, heads, kv_heads, importance):
    tensors = dyn_nsa_case(tokens, heads=heads, kv_heads=kv_heads, importance=importance)
    options = {"compress_size": 32, "window": 50, "max_blocks": 6, "importance": importance}
    ours, theirs = ops.dyn_nsa(**tensors, **options), reference.dyn_nsa(**tensors, **options)
    assert_close_rms(ours.out, theirs.out, 1e-12)
    assert torch.equal(ours.counts, theirs.counts)
    assert_close_rms(ours.tau, theirs.tau, 1e-12)
    assert_close_rms(ours.soft_counts, theirs.soft_counts, 1e-12)
    assert ours.overflow.item() == pytest.approx(theirs.overflow.item())


@pytest.mark.parametrize("dim", [16, 60, 64, 100, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_any_head_dim_and_precision(dtype, dim):
    low = dyn_nsa_case(260, dim=dim, dtype=dtype, sharpness=1.0)
    tau = torch.rand(1, 260, 2).double()
    options = {"compress_size": 32, "window": 50, "max_blocks": 40, "temperature": 2.0}
    ours = {name: tensor.clone().requires_grad_() for name, tensor in low.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in low.items()}
    out, expected = (
        ops.dyn_nsa(**ours, tau=tau.to(dtype), **options).out,
        reference.dyn_nsa(**exact, tau=tau.to(dtype), **options).out,
    )
    assert out.dtype == dtype
    assert_close_rms(out, expected, dtype)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(ours.values()), cotangent)
    wanted = torch.autograd.grad(expected, list(exact.values()), cotangent.double())
    for name, got, want in zip(low, grads, wanted, strict=True):
        # Two numbers each, sums over all tokens that mostly cancel.
        assert_close_rms(got, want, TOLERANCE[dtype] * (6 if name in ("base", "slope") else 2), f"gradient of {name}")


def test_all_blocks_is_causal_attention():
    tensors = dyn_nsa_case(200)
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 200, 4, 3)
    tensors["base"] = torch.full((2,), -30.0, dtype=torch.float64)
    result = ops.dyn_nsa(**tensors, max_blocks=4, compress_size=32)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close_rms(result.out, expected, 1e-12)
    assert (result.counts[0, :, 0] == torch.arange(200) // 64 + 1).all()
    assert result.overflow == 0


@pytest.mark.parametrize(
    ("importance", "bases"), [("share", (-25, -4, -3, -2, -1.5, -1, 0)), ("relative", (-25, -1, -0.5, 0, 0.5, 1, 30))], ids=RULES
)
def test_counts_fall_as_base_rises(importance, bases):
    """No share is above 1, whose log is 0."""
    tensors = dyn_nsa_case(640, compress_size=16)
    tensors["slope"].zero_()
    means = []
    for base in bases:
        tensors["base"] = torch.full((2,), float(base), dtype=torch.float64)
        means.append(ops.dyn_nsa(**tensors, compress_size=16, importance=importance).counts.double().mean().item())
    assert all(a >= b for a, b in pairwise(means))
    assert len(set(means)) >= 5
    assert means[-1] == pytest.approx((1 * 64 + 2 * 64 + 3 * 64 * 8) / 640)  # the forced blocks alone


def test_detached_scores_cut_the_gradient_through_the_gate():
    tensors = dyn_nsa_case()
    options = {"compress_size": 32, "window": 40, "temperature": 1.5}
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 330, 4, 3)
    for detach, reached in ((False, True), (True, False)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = ops.dyn_nsa(**leaves, detach_scores=detach, **options).out
        grads = dict(zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values())), strict=True))
        assert bool(grads["key_compressed"].abs().max() > 0) == reached
        assert grads["base"].abs().max() > 0


@pytest.mark.parametrize("importance", RULES)
def test_importance_at_its_floor_has_no_gradient(importance):
    tensors = dyn_nsa_case(400, compress_size=64)
    tensors["query"] = tensors["query"].abs()
    tensors["key_compressed"] = tensors["key_compressed"].abs()
    tensors["key_compressed"][:, 1] = -50.0
    tensors["base"] = torch.full((2,), -20.5, dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    options = {"temperature": 1.0, "compress_size": 64, "max_blocks": 10, "window": 20, "importance": importance}
    result, expected = ops.dyn_nsa(**leaves, **options), reference.dyn_nsa(**tensors, **options)
    assert_close_rms(result.out, expected.out, 1e-12)
    grads = torch.autograd.grad(result.soft_counts.sum(), [leaves["key_compressed"]])
    assert grads[0][:, 1].abs().max() < 1e-12


@pytest.mark.parametrize("importance", RULES)
def test_overflow_keeps_the_most_important_blocks(importance):
    tensors = dyn_nsa_case(900, compress_size=16, sharpness=5.0)
    tensors["base"] = torch.full((2,), -30.0, dtype=torch.float64)
    options = {"compress_size": 16, "max_blocks": 5, "window": 20, "importance": importance}
    result, expected = ops.dyn_nsa(**tensors, **options), reference.dyn_nsa(**tensors, **options)
    assert result.counts.max() == 5
    assert result.overflow.item() == pytest.approx((900 - 5 * 64) / 900)
    assert_close_rms(result.out, expected.out, 1e-12)


def test_two_runs_give_the_same_bits():
    tensors = dyn_nsa_case(700, dtype=torch.float32, compress_size=16)
    grads = []
    for _ in range(2):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = ops.dyn_nsa(**leaves, compress_size=16).out
        grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
