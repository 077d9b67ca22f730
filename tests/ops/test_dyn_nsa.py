"""DynNSA against the dense oracle: values, every gradient, and what must not matter (padding, packing, batch, cache)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import TOLERANCE, assert_close_rms, dtype_id

INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")
IMPLS = ["torch"]


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of whole blocks of positions, (B, T, K, D) -> (B, T // size, K, D)."""
    whole = x.shape[1] // size * size
    return x[:, :whole].unflatten(1, (-1, size)).mean(2) if whole else x[:, :0]


def case(
    tokens: int = 330,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    queries: int | None = None,
    compress_size: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sharpness: float = 3.0,
) -> dict[str, Tensor]:
    """Unit-scale inputs; keys of a position share a part, so that compressed keys are not all alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = tokens if queries is None else queries
    topics = draw(batch, -(-tokens // 16), kv_heads, dim).repeat_interleave(16, 1)[:, :tokens]
    key = draw(batch, tokens, kv_heads, dim) * 0.6 + topics * 0.8
    value = draw(batch, tokens, kv_heads, dim)
    tensors = {
        "query": draw(batch, queries, heads, dim) * sharpness**0.5,
        "key": key,
        "value": value,
        "key_compressed": pooled(key, compress_size) * sharpness**0.5,
        "value_compressed": pooled(value, compress_size),
        "gates": draw(batch, queries, heads, 3),
        "base": draw(kv_heads) * 0.3,
        "slope": draw(kv_heads) * 0.3,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def call(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> Any:
    return function(*(tensors[name] for name in INPUTS), **options)


def partly_open(tensors: dict[str, Tensor], options: dict[str, Any]) -> float:
    """Share of the unforced selectable pairs whose gate lies strictly between 0 and 1."""
    num_keys = tensors["key"].shape[1]
    compress_size = options.get("compress_size", 64)
    _, lse, entropy = reference.compressed_attention(
        tensors["query"], tensors["key_compressed"], tensors["value_compressed"], compress_size=compress_size, num_keys=num_keys
    )
    tau = reference.attention_tau(entropy, tensors["query"], num_keys, tensors["key"].shape[2], compress_size)
    threshold = tensors["base"].double() - tensors["slope"].double() * tau
    own = {key: options[key] for key in ("temperature", "block_size", "compress_size") if key in options}
    bias = reference.select_blocks(tensors["query"], tensors["key_compressed"], lse, threshold, max_blocks=1000, num_keys=num_keys, **own)[
        2
    ]
    block_size = options.get("block_size", 64)
    block = torch.arange(-(-num_keys // block_size))
    place = torch.arange(num_keys - tensors["query"].shape[1], num_keys)
    past = (block + 1) * block_size <= place[:, None] + 1
    forced = (block == 0) | (block >= place[:, None] // block_size - 1)
    selectable = int((past & ~forced).sum()) * tensors["key"].shape[2]
    return int((bias < 0).sum()) / max(1, selectable)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compress_size", [16, 32, 64])
@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
def test_every_gradient_is_exact(impl, compress_size, detach_scores):
    """Through the whole function, tau given, against autograd through the dense formula."""
    tensors = case(compress_size=compress_size)
    options = {"compress_size": compress_size, "window": 40, "temperature": 1.5, "max_blocks": 8, "detach_scores": detach_scores}
    assert partly_open(tensors, options) >= 0.2
    tau = torch.rand(1, 330, 2, dtype=torch.float64)
    grads, outputs = [], []
    for function in (lambda *a, **k: ops.dyn_nsa(*a, impl=impl, **k), reference.dyn_nsa):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        result = call(function, leaves, tau=tau, **options)
        out, soft = (result.out, result.soft_counts) if hasattr(result, "out") else (result[0], result[3])
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


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    tensors = {
        name: tensor.requires_grad_()
        for name, tensor in case(tokens=84, heads=2, kv_heads=1, dim=3, queries=20, compress_size=16, seed=3, sharpness=6.0).items()
    }
    options = {"block_size": 16, "compress_size": 16, "window": 7, "max_blocks": 5, "temperature": 2.0}
    tau = torch.rand(1, 20, 1, dtype=torch.float64)
    assert partly_open({k: v.detach() for k, v in tensors.items()}, options) >= 0.2

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.dyn_nsa(*leaves, tau=tau, impl=impl, **options)
        return result.out, result.soft_counts

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (8, 2), (8, 1), (16, 1)], ids=lambda v: str(v))
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 507])
def test_any_group_and_length(impl, tokens, heads, kv_heads):
    tensors = case(tokens, heads=heads, kv_heads=kv_heads)
    options = {"compress_size": 32, "window": 50, "max_blocks": 6}
    ours, theirs = call(ops.dyn_nsa, tensors, impl=impl, **options), call(reference.dyn_nsa, tensors, **options)
    assert_close_rms(ours.out, theirs[0], 1e-12)
    assert torch.equal(ours.counts, theirs[1])
    assert_close_rms(ours.tau, theirs[2], 1e-12)
    assert_close_rms(ours.soft_counts, theirs[3], 1e-12)
    assert ours.overflow.item() == pytest.approx(theirs[4].item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [16, 60, 64, 100, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_any_head_dim_and_precision(impl, dtype, dim):
    low = case(260, dim=dim, dtype=dtype, sharpness=1.0)
    tau = torch.rand(1, 260, 2).double()
    options = {"compress_size": 32, "window": 50, "max_blocks": 40, "temperature": 2.0}
    ours = {name: tensor.clone().requires_grad_() for name, tensor in low.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in low.items()}
    out, expected = (
        call(ops.dyn_nsa, ours, impl=impl, tau=tau.to(dtype), **options).out,
        call(reference.dyn_nsa, exact, tau=tau.to(dtype), **options)[0],
    )
    assert out.dtype == dtype
    assert_close_rms(out, expected, dtype)
    cotangent = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(ours.values()), cotangent)
    wanted = torch.autograd.grad(expected, list(exact.values()), cotangent.double())
    for name, got, want in zip(low, grads, wanted, strict=True):
        # Two numbers each, sums over all tokens that mostly cancel.
        assert_close_rms(got, want, TOLERANCE[dtype] * (6 if name in ("base", "slope") else 2), f"gradient of {name}")


@pytest.mark.parametrize("impl", IMPLS)
def test_all_blocks_is_causal_attention(impl):
    tensors = case(200)
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 200, 4, 3)
    tensors["base"] = torch.full((2,), -30.0, dtype=torch.float64)
    result = call(ops.dyn_nsa, tensors, impl=impl, max_blocks=4, compress_size=32)
    q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close_rms(result.out, expected, 1e-12)
    assert (result.counts[0, :, 0] == torch.arange(200) // 64 + 1).all()
    assert result.overflow == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_fall_as_base_rises(impl):
    tensors = case(640, compress_size=16)
    means = []
    for base in (-25.0, -1.0, -0.5, 0.0, 0.5, 1.0, 30.0):
        tensors["base"] = torch.full((2,), base, dtype=torch.float64)
        means.append(call(ops.dyn_nsa, tensors, impl=impl, compress_size=16).counts.double().mean().item())
    assert all(a >= b for a, b in pairwise(means))
    assert len(set(means)) >= 5
    assert means[-1] == pytest.approx((1 * 64 + 2 * 64 + 3 * 64 * 8) / 640)  # the forced blocks alone


@pytest.mark.parametrize("impl", IMPLS)
def test_detached_scores_cut_the_gradient_through_the_gate(impl):
    tensors = case()
    options = {"compress_size": 32, "window": 40, "temperature": 1.5}
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(1, 330, 4, 3)
    for detach, reached in ((False, True), (True, False)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = call(ops.dyn_nsa, leaves, impl=impl, detach_scores=detach, **options).out
        grads = dict(zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values())), strict=True))
        assert bool(grads["key_compressed"].abs().max() > 0) == reached
        assert grads["base"].abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_importance_at_its_floor_has_no_gradient(impl):
    tensors = case(400, compress_size=64)
    tensors["key_compressed"][:, 1] -= 200 * tensors["query"].mean((1, 2))[:, None]
    tensors["query"] = tensors["query"].abs()
    tensors["key_compressed"] = tensors["key_compressed"].abs()
    tensors["key_compressed"][:, 1] = -50.0
    tensors["base"] = torch.full((2,), -20.5, dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    result = call(ops.dyn_nsa, leaves, impl=impl, temperature=1.0, compress_size=64, max_blocks=10, window=20)
    expected = call(reference.dyn_nsa, tensors, temperature=1.0, compress_size=64, max_blocks=10, window=20)
    assert_close_rms(result.out, expected[0], 1e-12)
    grads = torch.autograd.grad(result.soft_counts.sum(), [leaves["key_compressed"]])
    assert grads[0][:, 1].abs().max() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_sequences_equal_themselves_alone(impl):
    lengths = [100, 1, 64, 0, 200, 37]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = int(bounds[-1])
    tensors = case(total, compress_size=32)
    kc = torch.full((1, total // 32, 2, 16), torch.nan, dtype=torch.float64)
    vc = torch.full_like(kc, torch.nan)
    pieces = []
    for start, end in pairwise(bounds.tolist()):
        piece = {name: tensor[:, start:end] if name in ("query", "key", "value", "gates") else tensor for name, tensor in tensors.items()}
        piece["key_compressed"], piece["value_compressed"] = pooled(piece["key"], 32), pooled(piece["value"], 32)
        at = start // 32
        kc[:, at : at + piece["key_compressed"].shape[1]] = piece["key_compressed"]
        vc[:, at : at + piece["value_compressed"].shape[1]] = piece["value_compressed"]
        pieces.append(piece)
    # What no sequence uses may hold anything finite; here it would show.
    unused = kc.isnan()
    tensors["key_compressed"], tensors["value_compressed"] = kc.masked_fill(unused, 1e3), vc.masked_fill(unused, 1e3)
    options = {"compress_size": 32, "window": 40, "max_blocks": 4}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    whole = call(ops.dyn_nsa, leaves, impl=impl, cu_seqlens=bounds, **options)
    assert_close_rms(whole.out, call(reference.dyn_nsa, tensors, cu_seqlens=bounds, **options)[0], 1e-12)
    (grad,) = torch.autograd.grad(whole.out.square().sum(), [leaves["key"]])
    for piece, (start, end) in zip(pieces, pairwise(bounds.tolist()), strict=True):
        piece["key"] = piece["key"].clone().requires_grad_()
        alone = call(ops.dyn_nsa, piece, impl=impl, **options)
        assert_close_rms(whole.out[:, start:end], alone.out, 1e-12)
        assert torch.equal(whole.counts[:, start:end], alone.counts)
        if end > start:
            assert_close_rms(grad[:, start:end], torch.autograd.grad(alone.out.square().sum(), [piece["key"]])[0], 1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(impl, side):
    lengths, width = [150, 90, 7], 180
    rows = [case(length, seed=i, compress_size=16) for i, length in enumerate(lengths)]
    starts = [{"left": width - n, "right": 0, "both": (width - n) // 2}[side] for n in lengths]
    batch: dict[str, Tensor] = {}
    for name in INPUTS[:6]:
        size = width if name in ("query", "key", "value", "gates") else width // 16
        batch[name] = torch.full((3, size, *rows[0][name].shape[2:]), 1e3, dtype=torch.float64)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            at = start if size == width else 0
            batch[name][i, at : at + row[name].shape[1]] = row[name][0]
    batch["base"], batch["slope"] = rows[0]["base"], rows[0]["slope"]
    bounds = {
        "key_start": torch.tensor(starts, dtype=torch.int32),
        "key_end": torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], dtype=torch.int32),
    }
    options = {"compress_size": 16, "window": 30, "max_blocks": 5}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in batch.items()}
    result = call(ops.dyn_nsa, leaves, impl=impl, **bounds, **options)
    grads = torch.autograd.grad(result.out.square().sum(), [leaves["query"], leaves["key"]])
    for i, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        alone = call(ops.dyn_nsa, {**row, "base": batch["base"], "slope": batch["slope"]}, impl=impl, **options)
        inside = slice(start, start + length)
        assert_close_rms(result.out[i, inside], alone.out[0], 1e-12)
        outside = torch.ones(width, dtype=torch.bool)
        outside[inside] = False
        assert (result.out[i, outside] == 0).all()
        for grad in grads:
            assert (grad[i, outside] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_decoding_equals_the_last_rows(impl, queries):
    tensors = case(300)
    whole = call(ops.dyn_nsa, tensors, impl=impl, compress_size=32, window=50)
    last = {name: tensor[:, -queries:] if name in ("query", "gates") else tensor for name, tensor in tensors.items()}
    result = call(ops.dyn_nsa, last, impl=impl, compress_size=32, window=50)
    assert_close_rms(result.out, whole.out[:, -queries:], 1e-12)
    assert torch.equal(result.counts, whole.counts[:, -queries:])


@pytest.mark.parametrize("impl", IMPLS)
def test_overflow_keeps_the_most_important_blocks(impl):
    tensors = case(900, compress_size=16, sharpness=5.0)
    tensors["base"] = torch.full((2,), -30.0, dtype=torch.float64)
    options = {"compress_size": 16, "max_blocks": 5, "window": 20}
    result, expected = call(ops.dyn_nsa, tensors, impl=impl, **options), call(reference.dyn_nsa, tensors, **options)
    assert result.counts.max() == 5
    assert result.overflow.item() == pytest.approx((900 - 5 * 64) / 900)
    assert_close_rms(result.out, expected[0], 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_the_same_bits(impl):
    tensors = case(700, dtype=torch.float32, compress_size=16)
    grads = []
    for _ in range(2):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = call(ops.dyn_nsa, leaves, impl=impl, compress_size=16).out
        grads.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hot_block_chosen_by_every_query(impl):
    tensors = case(513)
    key, value, query = tensors["key"], tensors["value"], tensors["query"]
    place = torch.arange(513)
    indices = torch.full((1, 513, 2, 2), -1, dtype=torch.int32)
    indices[..., 0] = 0
    indices[:, place >= 64, :, 1] = (place[place >= 64] // 64).to(torch.int32)[:, None]
    counts = (indices >= 0).sum(-1, dtype=torch.int32)
    bias = torch.randn(indices.shape, dtype=torch.float64)
    grads = []
    for function in (lambda *a: ops.block_sparse_attention(*a, impl=impl), reference.block_sparse_attention):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
        out, lse = function(*leaves[:3], indices, counts, leaves[3])
        grads.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.square().sum(), leaves)))
    for name, ours, theirs in zip(("out", "lse", "query", "key", "value", "bias"), *grads, strict=True):
        assert_close_rms(ours, theirs, 1e-11, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_compose_to_the_whole(impl):
    tensors = case(330)
    q, k, v, kc, vc = (tensors[name] for name in INPUTS[:5])
    compressed, lse, entropy = ops.compressed_attention(q, kc, vc, compress_size=32, impl=impl)
    visible = ((torch.arange(330) + 1) // 32).double()[:, None]
    tau = torch.where(visible > 1, entropy.unflatten(-1, (2, 2)).mean(-1) / visible.clamp(min=2).log(), 0.0)
    threshold = tensors["base"] - tensors["slope"] * tau
    selection = ops.select_blocks(q, kc, lse, threshold, compress_size=32, impl=impl)
    selected, _ = ops.block_sparse_attention(q, k, v, *selection[:3], impl=impl)
    near = ops.sliding_window_attention(q, k, v, 50, impl=impl)
    whole = call(ops.dyn_nsa, tensors, compress_size=32, window=50, impl=impl)
    gates = tensors["gates"]
    assert_close_rms(whole.out, gates[..., :1] * compressed + gates[..., 1:2] * selected + gates[..., 2:] * near, 1e-12)
    assert torch.equal(whole.counts, selection.counts)
    assert_close_rms(whole.tau, tau, 1e-12)


def _parts() -> dict[str, Callable[..., Any]]:
    def compressed(function: Any, t: dict[str, Tensor], **o: Any) -> Any:
        return function.compressed_attention(t["query"], t["key_compressed"], t["value_compressed"], compress_size=32, num_keys=330, **o)[
            :2
        ]

    def select(function: Any, t: dict[str, Tensor], **o: Any) -> Any:
        lse = t["lse"]
        found = function.select_blocks(
            t["query"], t["key_compressed"], lse, t["threshold"], compress_size=32, num_keys=330, temperature=1.5, **o
        )
        return found[2:4]

    def window(function: Any, t: dict[str, Tensor], **o: Any) -> Any:
        return (function.sliding_window_attention(t["query"], t["key"], t["value"], 50, **o),)

    return {"compressed": compressed, "select": select, "window": window}


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("part", list(_parts()))
@pytest.mark.parametrize("queries", [330, 90])
def test_each_part_has_exact_gradients(part, impl, queries):
    tensors = case(330, queries=queries)
    _, lse, _ = reference.compressed_attention(
        tensors["query"], tensors["key_compressed"], tensors["value_compressed"], compress_size=32, num_keys=330
    )
    tensors |= {"lse": lse, "threshold": torch.randn(1, queries, 2, dtype=torch.float64) * 0.3}
    results = []
    for function, options in ((ops, {"impl": impl}), (reference, {})):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        outputs = _parts()[part](function, leaves, **options)
        generator = torch.Generator().manual_seed(2)
        loss = sum(
            (out.masked_fill(out.isinf(), 0) * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs
        )
        results.append((outputs, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert_close_rms(ours, theirs, 1e-12)
    reached = 0
    for name, ours, theirs in zip(tensors, results[0][1], results[1][1], strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            reached += 1
            assert_close_rms(ours, theirs, 1e-11, f"gradient of {name}")
    assert reached >= 3


def test_statistics_carry_no_gradient():
    leaves = {name: tensor.requires_grad_() for name, tensor in case().items()}
    result = call(ops.dyn_nsa, leaves, compress_size=32)
    assert result.out.requires_grad
    assert result.soft_counts.requires_grad
    assert not any(tensor.requires_grad for tensor in (result.counts, result.tau, result.overflow))
    _, lse, entropy = ops.compressed_attention(leaves["query"], leaves["key_compressed"], leaves["value_compressed"], compress_size=32)
    assert lse.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    tensors = case(100, dtype=torch.float64)
    leaves = [tensors[name].requires_grad_() for name in INPUTS]
    tau = torch.rand(1, 100, 2, dtype=torch.float64)
    options = (40, 1.5, 64, 32, 4, False, 0.25, None, None, None, impl)
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, tau, *options))
    torch.library.opcheck(torch.ops.tinyonn.dyn_nsa.default, (*leaves, None, *options))
    q, k, v, kc, vc = leaves[:5]
    torch.library.opcheck(torch.ops.tinyonn.compressed_attention.default, (q, kc, vc, 32, 100, 0.25, None, None, None, impl))
    torch.library.opcheck(torch.ops.tinyonn.sliding_window_attention.default, (q, k, v, 20, 0.25, None, None, None, impl))


def test_it_compiles_whole():
    tensors = case(200, dtype=torch.float32)

    def step(*leaves: Tensor) -> Tensor:
        result = ops.dyn_nsa(*leaves, compress_size=32)
        return result.out.square().sum() + result.soft_counts.sum() + result.tau.sum()

    grads = []
    with torch.compiler.config.patch(force_disable_caches=True):
        for function in (step, torch.compile(step, fullgraph=True)):
            leaves = [tensors[name].clone().requires_grad_() for name in INPUTS]
            grads.append(torch.autograd.grad(function(*leaves), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


GOOD = {name: tensor.float() for name, tensor in case(96, compress_size=32).items()}
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
    "more queries": ({"query": ones(1, 97, 4, 16)}, {}, ValueError, "query must have at most as many tokens as there are keys, 96, got 97"),
    "compressed": (
        {"key_compressed": ones(1, 4, 2, 16), "value_compressed": ones(1, 4, 2, 16)}, {}, ValueError,
        "key_compressed must hold 3 keys, one for every 32 of 96, got 4",
    ),
    "compressed heads": (
        {"key_compressed": ones(1, 3, 1, 16), "value_compressed": ones(1, 3, 1, 16)}, {}, ValueError,
        "key_compressed must have key's 2 heads, got 1",
    ),
    "gates": ({"gates": ones(1, 96, 4, 2)}, {}, ValueError, r"gates must have shape \(1, 96, 4, 3\), got"),
    "base": ({"base": ones(4)}, {}, ValueError, r"base must have shape \(2,\), got \(4,\)"),
    "tau": ({}, {"tau": ones(1, 96)}, ValueError, r"tau must have shape \(1, 96, 2\), got \(1, 96\)"),
    "dtype": ({"key": ones(1, 96, 2, 16, dtype=torch.float64)}, {}, TypeError, r"key must be torch\.float32, got torch\.float64"),
    "integers": (
        {"query": ones(1, 96, 4, 16, dtype=torch.int64)}, {}, TypeError, "query must be float16, bfloat16, float32 or float64",
    ),
    "head dim": ({name: ones(1, 96, 2, 257) for name in ("query", "key", "value")}, {}, ValueError, "1 … 256 dimensions"),
    "compress size": (
        {}, {"compress_size": 48}, ValueError, r"compress_size must be one of \(16, 32, 64\) that divides block_size 64, got 48",
    ),
    "block size": ({}, {"block_size": 48}, ValueError, "block_size must be a power of two of at least 16, got 48"),
    "max blocks": ({}, {"max_blocks": 2}, ValueError, "max_blocks must be at least 3, the forced ones, got 2"),
    "window": ({}, {"window": 0}, ValueError, "window must be at least 1, got 0"),
    "temperature": ({}, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "scale": ({}, {"scale": math.nan}, ValueError, "scale must be positive and finite, got nan"),
    "packed and padded": ({}, {"cu_seqlens": PACKED, "key_start": ZERO}, ValueError, "must be None together with cu_seqlens"),
    "packed dtype": ({}, {"cu_seqlens": PACKED.long()}, TypeError, r"cu_seqlens must be int32, got torch\.int64"),
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
        call(ops.dyn_nsa, {**GOOD, **tensors}, **{"compress_size": 32, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, c: (i.fill_(9), c), "indices must be 0 … 1, got 9"),
        (lambda i, c: (i.flip(-1), c), "indices must ascend"),
        (lambda i, c: (i, c + 5), "counts must be 0 … 2, got 6 … 7"),
    ],
    ids=["range", "order", "counts"],
)
def test_debug_looks_at_the_lists(change, message):
    q, k = torch.randn(1, 96, 2, 16), torch.randn(1, 96, 1, 16)
    indices = torch.tensor([0, 1], dtype=torch.int32).expand(1, 96, 1, 2).clone()
    counts = (torch.arange(96) >= 64).int()[None, :, None] + 1
    ops.block_sparse_attention(q, k, k, indices, counts)
    with tinyonn.debug(), pytest.raises(ValueError, match=message):
        ops.block_sparse_attention(q, k, k, *change(indices, counts))


def test_debug_looks_at_the_bounds():
    bounds = torch.tensor([0, 50, 40, 96], dtype=torch.int32)
    with tinyonn.debug(), pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 96"):
        call(ops.dyn_nsa, GOOD, compress_size=32, cu_seqlens=bounds)
    with tinyonn.debug(), pytest.raises(ValueError, match="key_start and key_end must be 0 <= start <= end <= 96"):
        call(ops.dyn_nsa, GOOD, compress_size=32, key_end=torch.tensor([97], dtype=torch.int32))


def test_autocast_changes_nothing():
    tensors = case(200, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = call(ops.dyn_nsa, leaves, compress_size=32).out
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match=r"impl='triton' must have float16, bfloat16 or float32 tensors, got torch\.float64"):
        call(ops.dyn_nsa, case(96, compress_size=32), compress_size=32, impl="triton")


def test_strides_do_not_matter():
    tensors = case(150)
    turned = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in tensors.items()}
    a, b = call(ops.dyn_nsa, tensors, compress_size=32), call(ops.dyn_nsa, turned, compress_size=32)
    assert_close_rms(a.out, b.out, 1e-14)


def test_no_tokens():
    tensors = case(0)
    result = call(ops.dyn_nsa, {name: tensor.requires_grad_() for name, tensor in tensors.items()}, compress_size=32)
    assert result.out.shape == (1, 0, 4, 16)
    result.out.sum().backward()
    assert tensors["base"].grad.tolist() == [0, 0]
