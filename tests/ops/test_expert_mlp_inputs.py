"""What `expert_mlp` takes: nothing, any strides, values that are not finite; and what it names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL_IMPLS
from tinyonn.testing import assert_close_rms, impl_device

from .expert_cases import IMPLS, LAYOUTS, leaves_of, routing, tokens_of, weights


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


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "3-d tokens": ({"hidden_states": torch.zeros(1, 4, 8)}, ValueError, r"hidden_states must have shape \(N, F\)"),
    "other features": ({"hidden_states": torch.zeros(4, 9)}, ValueError, r"gate_up_proj must have shape \(E, ·, 9\)"),
    "odd gate": ({"gate_up_proj": torch.zeros(3, 5, 8)}, ValueError, "even number of outputs"),
    "other neurons": ({"down_proj": torch.zeros(3, 8, 7)}, ValueError, r"down_proj must have shape \(3, 8, 4\)"),
    "other dtype": ({"down_proj": torch.zeros(3, 8, 4, dtype=torch.float64)}, TypeError, "down_proj must be torch.float32"),
    "other device": ({"down_proj": torch.zeros(3, 8, 4, device="meta")}, ValueError, "down_proj must be on cpu"),
    "no down_proj": ({"down_proj": None}, TypeError, "down_proj must be a torch.Tensor, got NoneType"),
    "float index": ({"top_k_index": torch.zeros(4, 2)}, TypeError, "top_k_index must be an int32 or int64"),
    "other tokens": ({"top_k_index": torch.zeros(5, 2, dtype=torch.long)}, ValueError, r"top_k_index must have shape \(4, K\)"),
    "other slots": ({"top_k_weights": torch.zeros(4, 3)}, ValueError, r"top_k_weights must have shape \(4, 2\)"),
    "bias": ({"gate_up_bias": torch.zeros(3, 4)}, ValueError, r"gate_up_bias must have shape \(3, 8\)"),
    "probe": ({"surprise": torch.zeros(4, 3)}, ValueError, r"surprise must have shape \(4, 2\)"),
    "probe dtype": ({"surprise": torch.zeros(4, 2, dtype=torch.bfloat16)}, TypeError, "surprise must be torch.float32"),
    "activation": ({"activation": "swish"}, ValueError, "activation must be one of silu"),
    "limit of silu": ({"limit": 7.0}, ValueError, "limit must be None with activation='silu', which has no clamp, got 7.0"),
    "limit 0": ({"activation": "clamped_silu", "limit": 0}, ValueError, "limit must be above 0, got 0"),
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
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_token_that_is_not_finite_changes_no_other(name, impl):
    """NaN or infinity out for it alone, as of a dense layer; gradients of other tokens, and of experts it did not go to, as without it."""
    layout, device = LAYOUTS[name], impl_device(impl)
    params = weights(5, 6, 8, layout=layout, biased=True, dtype=torch.float32)
    x, (index, weight) = tokens_of(9, 8, torch.float32), routing(9, 2, 5, unused=0, dtype=torch.float32)
    index[3] = torch.tensor([4, 5])
    index = torch.where((index == 4) & (torch.arange(9) != 3).unsqueeze(-1), 5, index)
    others = [token for token in range(9) if token != 3]
    results = []
    for element in (0.5, math.nan, math.inf):
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
    for wanted, *found in zip(*results, strict=True):
        for got in found:
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("activation", "kind", "message"), [
    ("nope", "down_proj", "activation must be one of silu, .*, got 'nope'"),
    ("silu", "nope", "surprise_kind must be one of down_proj, .*, got 'nope'"),
])  # fmt: skip
def test_the_registered_op_names_an_unknown_kind(activation, kind, message):
    params, x = weights(4, 8, 16), tokens_of(12, 16)
    index, weight = routing(12, 2, 4)
    layout = (activation, True, False, False, 0.0)
    tensors = (x, params["gate_up_proj"], params["down_proj"], index, weight, None, None)
    with pytest.raises(ValueError, match=message):
        torch.ops.tinyonn.expert_mlp(*tensors, None, kind, *layout, "torch")
    _, pre = torch.ops.tinyonn.expert_mlp(*tensors, None, "down_proj", "silu", *layout[1:], "torch")
    with pytest.raises(ValueError, match=message):
        torch.ops.tinyonn.expert_mlp_backward(*tensors, pre, torch.ones_like(x), *layout, kind, True, True, True, "torch")
