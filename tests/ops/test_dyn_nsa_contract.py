"""DynNSA as an op of torch: registration, compilation, autocast, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn import ops
from tinyonn.testing import dyn_nsa_case

INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")
IMPLS = ["torch"]


def test_statistics_carry_no_gradient():
    leaves = {name: tensor.requires_grad_() for name, tensor in dyn_nsa_case().items()}
    result = ops.dyn_nsa(**leaves, compress_size=32)
    assert result.out.requires_grad
    assert result.soft_counts.requires_grad
    assert not any(tensor.requires_grad for tensor in (result.counts, result.tau, result.overflow))
    _, lse, entropy = ops.compressed_attention(leaves["query"], leaves["key_compressed"], leaves["value_compressed"], compress_size=32)
    assert lse.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    tensors = dyn_nsa_case(100, dtype=torch.float64)
    leaves = [tensors[name].requires_grad_() for name in INPUTS]
    tau = torch.rand(1, 100, 2, dtype=torch.float64)
    scoring = leaves[0].detach().clone().requires_grad_()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    options = (40, 1.5, 64, 32, 4, "share", 1, 2, False, 0.25, 2.0, None, None, None, impl)
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, tau, None, None, *options))
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, None, scoring, sinks, *options))
    q, k, v, kc, vc = leaves[:5]
    torch.library.opcheck(torch.ops.tinyonn.compressed_attention.default, (q, kc, vc, sinks, 32, 100, 0.25, None, None, None, None, impl))
    torch.library.opcheck(torch.ops.tinyonn.sliding_window_attention.default, (q, k, v, None, 20, 0.25, 2.0, None, None, None, impl))


def test_it_compiles_whole():
    """With inductor: tests/hf/test_dyn_nsa_training.py."""
    tensors = dyn_nsa_case(200, dtype=torch.float32)

    def step(*leaves: Tensor) -> Tensor:
        result = ops.dyn_nsa(*leaves, compress_size=32)
        return result.out.square().sum() + result.soft_counts.sum() + result.tau.sum()

    grads = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensors[name].clone().requires_grad_() for name in INPUTS]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    tensors = dyn_nsa_case(200, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = ops.dyn_nsa(**leaves, compress_size=32).out
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_autocast_a_wider_key_comes_as_torchs_attention_takes_it():
    """A rotation or a norm leaves queries or keys in float32 beside bfloat16 values."""
    tensors = dyn_nsa_case(100, dtype=torch.float32)
    q, k, v, kc, vc = (tensors[name] for name in INPUTS[:5])
    half = {name: x.bfloat16() for name, x in zip(("q", "k", "v", "kc", "vc"), (q, k, v, kc, vc), strict=True)}
    lists = torch.zeros(1, 100, 2, 1, dtype=torch.int32), torch.ones(1, 100, 2, dtype=torch.int32)
    lse = torch.zeros(q.shape[:3])
    rest = {name: tensors[name] for name in INPUTS[5:]}
    calls: dict[str, Callable[..., Any]] = {
        "queries": lambda q, k, v, kc, vc: (
            ops.dyn_nsa(q, k.to(q.dtype), v, kc.to(q.dtype), vc, **rest, query_compressed=k.repeat_interleave(2, 2), compress_size=32).out
        ),
        "dyn_nsa": lambda q, k, v, kc, vc: ops.dyn_nsa(q, k, v, kc, vc, **rest, compress_size=32).out,
        "compressed": lambda q, k, v, kc, vc: ops.compressed_attention(q, kc, vc, num_keys=100, compress_size=32),
        "selected": lambda q, k, v, kc, vc: ops.block_sparse_attention(q, k, v, *lists),
        "window": lambda q, k, v, kc, vc: ops.sliding_window_attention(q, k, v, 20),
        "selection": lambda q, k, v, kc, vc: ops.select_blocks(q, kc, lse, lse[..., :2] - 9, num_keys=100, compress_size=32).soft_counts,
        "statistics": lambda q, k, v, kc, vc: ops.attention_stats(q, k).entropy,
    }
    for name, call in calls.items():
        mixed = {"q": half["q"], "k": k, "v": half["v"], "kc": kc, "vc": half["vc"]}
        with pytest.raises(TypeError, match=r"must be torch\.bfloat16, got torch\.float32"):
            call(**mixed)
        with torch.autocast("cpu", torch.bfloat16):
            got = call(**mixed)
        expected = call(**half)
        for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, expected)), strict=True):
            assert torch.equal(one, other), name


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match=r"impl='triton' needs float16, bfloat16 or float32 tensors, got torch\.float64"):
        ops.dyn_nsa(**dyn_nsa_case(96, compress_size=32), compress_size=32, impl="triton")


GOOD = {name: tensor.float() for name, tensor in dyn_nsa_case(96, compress_size=32).items()}


PACKED = torch.tensor([0, 96], dtype=torch.int32)


ZERO = torch.tensor([0], dtype=torch.int32)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


Bad = tuple[dict[str, Any], dict[str, Any], type[Exception], str]


BAD_CALLS: dict[str, Bad] = {
    "heads": (
        {"key": ones(1, 96, 3, 16), "value": ones(1, 96, 3, 16)}, {}, ValueError,
        "key must have a number of heads that divides query's 4, got 3",
    ),
    "key dims": ({"key": ones(1, 96, 2, 8)}, {}, ValueError, r"key must have shape \(1, T, K, 16\), got \(1, 96, 2, 8\)"),
    "value": ({"value": ones(1, 95, 2, 16)}, {}, ValueError, r"value must have shape \(1, 96, 2, 16\), got \(1, 95, 2, 16\)"),
    "more queries": ({"query": ones(1, 97, 4, 16)}, {}, ValueError, "query must have at most 96 tokens, the number of keys, got 97"),
    "compressed": (
        {"key_compressed": ones(1, 4, 2, 16), "value_compressed": ones(1, 4, 2, 16)}, {}, ValueError,
        "key_compressed must have 3 keys, one for every 32 of 96, got 4",
    ),
    "compressed heads": (
        {"key_compressed": ones(1, 3, 1, 16), "value_compressed": ones(1, 3, 1, 16)}, {}, ValueError,
        "key_compressed must have key's 2 heads, got 1",
    ),
    "gates": ({"gates": ones(1, 96, 4, 2)}, {}, ValueError, r"gates must have shape \(1, 96, 4, 3\), got"),
    "base": ({"base": ones(4)}, {}, ValueError, r"base must have shape \(2,\), got \(4,\)"),
    "tau": ({}, {"tau": ones(1, 96)}, ValueError, r"tau must have shape \(1, 96, 2\), got \(1, 96\)"),
    "query_compressed": (
        {}, {"query_compressed": ones(1, 96, 2, 16)}, ValueError,
        r"query_compressed must have shape \(1, 96, 4, 16\), got \(1, 96, 2, 16\)",
    ),
    "query_compressed dtype": (
        {}, {"query_compressed": ones(1, 96, 4, 16, dtype=torch.float64)}, TypeError,
        r"query_compressed must be torch\.float32, got torch\.float64",
    ),
    "query_compressed type": ({}, {"query_compressed": 1.0}, TypeError, r"query_compressed must be a torch\.Tensor, got float"),
    "dtype": ({"key": ones(1, 96, 2, 16, dtype=torch.float64)}, {}, TypeError, r"key must be torch\.float32, got torch\.float64"),
    "integers": (
        {"query": ones(1, 96, 4, 16, dtype=torch.int64)}, {}, TypeError, "query must be float16, bfloat16, float32 or float64",
    ),
    "head dim": ({name: ones(1, 96, 2, 257) for name in ("query", "key", "value")}, {}, ValueError, "1 … 256 dimensions"),
    "compress size": (
        {}, {"compress_size": 48}, ValueError, r"compress_size must be one of \(16, 32, 64\) that divides block_size 64, got 48",
    ),
    "block size": ({}, {"block_size": 48}, ValueError, "block_size must be a power of two of at least 16, got 48"),
    "importance": ({}, {"importance": "mass"}, ValueError, "importance must be one of share, relative, got 'mass'"),
    "max blocks": ({}, {"max_blocks": 2}, ValueError, "max_blocks must be at least 3, the number of forced blocks, got 2"),
    "forced": (
        {}, {"forced_first": 3, "forced_local": 4, "max_blocks": 6}, ValueError,
        "max_blocks must be at least 7, the number of forced blocks, got 6",
    ),
    "no own block": ({}, {"forced_local": 0}, ValueError, "forced_local must be at least 1, got 0"),
    "forced first": ({}, {"forced_first": -1}, ValueError, "forced_first must be at least 0, got -1"),
    "forced number": ({}, {"forced_first": True}, TypeError, "forced_first must be an int, got bool"),
    "window": ({}, {"window": 0}, ValueError, "window must be at least 1, got 0"),
    "temperature": ({}, {"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
    "subnormal temperature": ({}, {"temperature": 1e-39}, ValueError, "temperature must be at least 1.18e-38, the smallest normal float32"),
    "scale": ({}, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "packed and padded": ({}, {"cu_seqlens": PACKED, "key_start": ZERO}, ValueError, "must be None if cu_seqlens is given"),
    "packed dtype": ({}, {"cu_seqlens": PACKED.float()}, TypeError, r"cu_seqlens must be int32 or int64, got torch\.float32"),
    "list": ({}, {"key_start": [0]}, TypeError, r"key_start must be a torch\.Tensor, got list"),
    "packed decoding": (
        {"query": ones(1, 9, 4, 16), "gates": ones(1, 9, 4, 3)}, {"cu_seqlens": PACKED}, ValueError, "got 1 rows, 9 queries, 96 keys",
    ),
    "start": ({}, {"key_start": PACKED}, ValueError, r"key_start must have shape \(1,\), got \(2,\)"),
    "impl": ({}, {"impl": "fast"}, ValueError, "impl must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_input_is_named(name):
    tensors, options, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        ops.dyn_nsa(**{**GOOD, **tensors}, **{"compress_size": 32, **options})


@pytest.mark.parametrize("tokens", [1, 9, 96])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_tensors_in_the_order_of_sdpa_are_told_so(kv_heads, tokens):
    tensors = dyn_nsa_case(96, heads=4, kv_heads=kv_heads, queries=tokens)
    turned = {name: tensor.transpose(1, 2) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"tensors are \(B, T, H, D\) here; transpose\(1, 2\) those in .* order \(B, H, T, D\)\.$"):
        ops.dyn_nsa(**turned, compress_size=32)


def test_bounds_of_64_bits_are_those_of_32():
    packed = torch.tensor([0, 30, 96])
    for bounds in ({"cu_seqlens": packed}, {"key_start": packed[1:2]}, {"key_end": packed[1:2]}):
        wide, narrow = (
            ops.dyn_nsa(**GOOD, compress_size=32, **{name: bound.to(dtype) for name, bound in bounds.items()}).out
            for dtype in (torch.int64, torch.int32)
        )
        assert torch.equal(wide, narrow)
    with pytest.raises(ValueError, match="key_end 0 … 96"):
        ops.dyn_nsa(**GOOD, compress_size=32, key_end=torch.tensor([(1 << 32) + 5]))


def _calls() -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """Each op by name, and which of `tensors_of_parts` it takes."""
    q, k, v, kc, vc = INPUTS[:5]
    return {
        "dyn_nsa": (lambda *t, **o: ops.dyn_nsa(*t, block_size=32, compress_size=32, temperature=9.0, **o).out, INPUTS),
        "compressed_attention": (lambda *t, **o: ops.compressed_attention(*t, compress_size=32, **o)[0], (q, kc, vc)),
        "select_blocks": (
            lambda *t, **o: ops.select_blocks(*t, block_size=32, compress_size=32, temperature=9.0, **o).bias, (q, kc, "lse", "threshold")
        ),
        "block_sparse_attention": (
            lambda q, k, v, bias, **o: ops.block_sparse_attention(q, k, v, *LISTS, bias, block_size=32, **o)[0], (q, k, v, "bias")
        ),
        "sliding_window_attention": (lambda *t, **o: ops.sliding_window_attention(*t, 20, **o), (q, k, v)),
    }  # fmt: skip


LISTS = (torch.zeros(1, 160, 2, 1, dtype=torch.int32), torch.ones(1, 160, 2, dtype=torch.int32))


def tensors_of_parts() -> dict[str, Tensor]:
    tensors = dyn_nsa_case(160)
    tensors["base"] -= 5
    lse = ops.compressed_attention(tensors["query"], tensors["key_compressed"], tensors["value_compressed"], compress_size=32)[1]
    return tensors | {"lse": lse, "threshold": torch.full((1, 160, 2), -5.0).double(), "bias": torch.randn(1, 160, 2, 1).double()}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, (_, names) in _calls().items() for place in range(len(names))])
def test_forward_mode_is_refused_not_zero(name, place):
    """By a registered op; the reference, which is plain autograd, has the tangents that reverse mode implies."""
    call, names = _calls()[name]
    inputs = [tensors_of_parts()[part] for part in names]
    direction = torch.randn_like(inputs[place])

    def along(x: Tensor, **options: Any) -> Tensor:
        return call(*inputs[:place], x, *inputs[place + 1 :], **options)

    for options in ({}, {"impl": "torch"}):
        with pytest.raises(RuntimeError, match=f"{name} does not support forward-mode differentiation"):
            torch.func.jvp(lambda x, options=options: along(x, **options), (inputs[place],), (direction,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        along(torch.autograd.forward_ad.make_dual(inputs[place], direction))

    _, tangent = torch.func.jvp(lambda x: along(x, impl="reference"), (inputs[place],), (direction,))
    leaf = inputs[place].clone().requires_grad_()
    out = along(leaf)
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, cotangent)
    assert gradient.abs().max() > 0
    torch.testing.assert_close((tangent * cotangent).sum(), (gradient * direction).sum())


def test_a_tangent_of_the_gradient_is_refused_not_zero():
    leaves = [tensor.requires_grad_() for tensor in dyn_nsa_case(96).values()]
    out = ops.dyn_nsa(*leaves, compress_size=32).out
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.autograd.grad(out, leaves, torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_forward_mode_is_refused_when_compiled():
    q, k, v = (dyn_nsa_case(96)[name] for name in INPUTS[:3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def derivative(q: Tensor) -> Tensor:
        return torch.func.jvp(lambda q: ops.sliding_window_attention(q, k, v, 20), (q,), (q,))[1]

    with pytest.raises(Exception, match="does not support forward-mode differentiation"):
        derivative(q)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_debug_looks_at_tau(impl, wrong):
    tau = torch.full((1, 96, 2), 0.5)
    tau[0, 95, 1] = wrong
    ops.dyn_nsa(**GOOD, tau=tau, compress_size=32, impl=impl)
    with tinyonn.debug(), pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got"):
        ops.dyn_nsa(**GOOD, tau=tau, compress_size=32, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("bounds", [{"cu_seqlens": [0, 64, 256]}, {"key_start": [192]}, {"key_end": [64]}], ids=["packed", "left", "right"])
def test_debug_counts_blocks_from_the_start_of_a_sequence(bounds, impl):
    bounds = {name: torch.tensor(value, dtype=torch.int32) for name, value in bounds.items()}
    q, k = torch.randn(1, 256, 4, 16), torch.randn(1, 256, 2, 16)
    indices = torch.zeros(1, 256, 2, 2, dtype=torch.int32)
    counts = torch.ones(1, 256, 2, dtype=torch.int32)
    with tinyonn.debug():
        ops.block_sparse_attention(q, k, k, indices, counts, impl=impl, **bounds)
        indices[0, 9, 1, 1], counts[0, 9, 1] = 2, 2
        with pytest.raises(ValueError, match="indices must be 0 … 0 in the sequence of token 9, got 2"):
            ops.block_sparse_attention(q, k, k, indices, counts, impl=impl, **bounds)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_numbers_are_checked_whatever_runs(impl):
    with pytest.raises(ValueError, match="scale must be above 0, got -1"):
        ops.sliding_window_attention(GOOD["query"], GOOD["key"], GOOD["value"], 8, scale=-1, impl=impl)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        ops.dyn_nsa(**GOOD, compress_size=32, temperature="1", impl=impl)
    with pytest.raises(TypeError, match="num_keys must be an int, got float"):
        ops.compressed_attention(
            GOOD["query"], GOOD["key_compressed"], GOOD["value_compressed"], compress_size=32, num_keys=96.0, impl=impl
        )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", [*GOOD, "tau", "query_compressed"])
def test_debug_names_nan(name, impl):
    tensors = {**{key: x.clone() for key, x in GOOD.items()}, "tau": torch.zeros(1, 96, GOOD["key"].shape[2])}
    tensors["query_compressed"] = GOOD["query"].clone()
    tensors[name].view(-1)[-1] = math.nan
    with tinyonn.debug(), pytest.raises(ValueError, match=f"{name} must not contain NaN"):
        ops.dyn_nsa(**tensors, compress_size=32, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "bounds",
    [
        {"cu_seqlens": [5, 96]},
        {"cu_seqlens": [0, 90]},
        {"cu_seqlens": [0, 200]},
        {"cu_seqlens": [0]},
        {"key_start": [-5]},
        {"key_end": [97]},
    ],
    ids=str,
)
def test_bounds_out_of_range_are_refused_on_a_cpu(bounds, impl):
    bounds = {name: torch.tensor(value, dtype=torch.int32) for name, value in bounds.items()}
    with pytest.raises(ValueError, match=r"must ascend from 0 to 96|key_end 0 … 96"):
        ops.dyn_nsa(**GOOD, compress_size=32, impl=impl, **bounds)


@pytest.mark.parametrize("tokens", [1, 64])
def test_lists_without_slots(tokens):
    q, k = torch.randn(1, tokens, 4, 16), torch.randn(1, tokens, 2, 16)
    indices, counts = torch.zeros(1, tokens, 2, 0, dtype=torch.int32), torch.zeros(1, tokens, 2, dtype=torch.int32)
    out, lse = ops.block_sparse_attention(q, k, k, indices, counts)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_debug_looks_at_the_bounds():
    bounds = torch.tensor([0, 50, 40, 96], dtype=torch.int32)
    with tinyonn.debug(), pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 96"):
        ops.dyn_nsa(**GOOD, compress_size=32, cu_seqlens=bounds)
    with tinyonn.debug(), pytest.raises(ValueError, match="key_start must be at least 0 and key_end 0 … 96"):
        ops.dyn_nsa(**GOOD, compress_size=32, key_end=torch.tensor([97], dtype=torch.int32))
