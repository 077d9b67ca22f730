"""Attention sinks, as in gpt-oss, in every op of DynNSA: against transformers' eager attention, and against the dense oracle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import tinyonn
from tinyonn import ops, reference
from tinyonn.testing import IMPLS, assert_close_rms, dyn_nsa_case, impl_device

from .dyn_nsa_cases import BOUNDS, DEVICE, HALF, INPUTS, SHAPES, all_blocks, attentions, bounded, case, compare, partly_open

SINKS = torch.tensor([-1.5, 0.4, 2.0, 5.0], dtype=torch.float64)
OPTIONS: dict[str, Any] = {"block_size": 32, "compress_size": 16, "window": 40, "temperature": 1.5, "max_blocks": 8}


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("name", ["dyn_nsa", "block_sparse_attention", "sliding_window_attention"])
def test_all_keys_are_gpt_oss_eager_attention(impl, name):
    tokens = 70
    tensors = dyn_nsa_case(tokens, dtype=torch.float32, sharpness=16.0) | {"sinks": SINKS.float()}
    hidden = torch.full((tokens, tokens), -torch.inf).triu(1)

    def eager(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks.double())
        heads_first = (x.double().transpose(1, 2) for x in (query, key, value))
        return eager_attention_forward(module, *heads_first, hidden, scaling=0.4)[0]

    results = []
    leaves_of = (*INPUTS[:3], "sinks")
    for function, device in ((attentions(impl, tokens, scale=0.4)[name], impl_device(impl)), (eager, "cpu")):
        leaves = [tensors[part].to(device).requires_grad_() for part in leaves_of]
        out = function(*leaves[:3], sinks=leaves[3])
        results.append((out, *torch.autograd.grad(out.double().pow(3).sum(), leaves)))
    for part, ours, theirs in zip(("out", *leaves_of), *results, strict=True):
        assert_close_rms(ours, theirs, 1e-5, part)


@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_gradient_is_exact(detach_scores, softcap):
    tensors = dyn_nsa_case(compress_size=16) | {"sinks": SINKS}
    tensors["query_compressed"] = tensors["query"].flip(1)
    tensors["base"] = tensors["base"] - 1.5  # a sink takes its part of each block's share
    assert partly_open(tensors | {"query": tensors["query_compressed"]}, {**OPTIONS, "softcap": softcap}) >= 0.2
    tau = torch.rand(1, 330, 2, dtype=torch.float64)
    results = []
    for function in (ops.dyn_nsa, reference.dyn_nsa):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        result = function(**leaves, tau=tau, softcap=softcap, detach_scores=detach_scores, **OPTIONS)
        loss = result.out.pow(3).sum() + result.soft_counts.square().sum()
        results.append((result.out, result.soft_counts, *torch.autograd.grad(loss, list(leaves.values()))))
    for name, ours, theirs in zip(("out", "soft_counts", *tensors), *results, strict=True):
        assert theirs.abs().max() > 0
        assert_close_rms(ours, theirs, 1e-11, name)


SHARES = [(sinks, softcap, impl) for sinks in (None, SINKS) for softcap in (None, 1.5) for impl in ("torch", "reference")]
# In the interpreter a case takes ten seconds: with both and with neither always run.
SHARES += [
    pytest.param(sinks, softcap, "triton", marks=[*IMPLS[1].marks, *[pytest.mark.slow] * ((sinks is None) != (softcap is None))])
    for sinks in (None, SINKS)
    for softcap in (None, 1.5)
]


@pytest.mark.parametrize(("sinks", "softcap", "impl"), SHARES)
def test_the_selection_counts_shares_of_the_whole_attention(impl, sinks, softcap):
    """Shares by a plain softmax over what the last query sees, its sink included: each decides whether its block is selected."""
    device = impl_device(impl)
    tensors = {name: x.to(device) for name, x in dyn_nsa_case(160, compress_size=16, dtype=torch.float32).items()}
    q, kc, vc = (tensors[name] for name in ("query", "key_compressed", "value_compressed"))
    scores = torch.einsum("hd,mhd->hm", q[0, -1].double(), kc[0].double().repeat_interleave(2, 1)).cpu() / 4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    with_sink = scores if sinks is None else torch.cat([scores, sinks[:, None]], 1)
    share = with_sink.softmax(1)[:, :10].unflatten(0, (2, 2)).mean(1).unflatten(1, (5, 2)).sum(2)
    options = {"compress_size": 16, "softcap": softcap, "impl": impl}
    lse = ops.compressed_attention(q, kc, vc, sinks=None if sinks is None else sinks.float().to(device), **options)[1]
    for offset in (-1e-4, 1e-4):
        for block in (1, 2):
            threshold = (share[:, block].log() + offset).float().expand(1, 160, 2).to(device)
            found = ops.select_blocks(q, kc, lse, threshold, block_size=32, **options)
            listed = [set(found.indices[0, -1, head, : found.counts[0, -1, head]].tolist()) for head in range(2)]
            assert [block in one for one in listed] == [offset < 0] * 2


def test_gradcheck():
    tensors = dyn_nsa_case(tokens=84, heads=2, kv_heads=1, dim=3, queries=20, compress_size=16, seed=3, sharpness=6.0)
    tensors["base"] = tensors["base"] - 1.0
    tensors["sinks"] = torch.tensor([0.5, 1.5], dtype=torch.float64)
    tau = torch.rand(1, 20, 1, dtype=torch.float64)
    sizes: dict[str, Any] = {"block_size": 16, "compress_size": 16, "temperature": 2.0}
    assert partly_open(tensors, sizes) >= 0.2

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.dyn_nsa(*leaves[:8], tau=tau, sinks=leaves[8], window=7, max_blocks=5, **sizes)
        return result.out, result.soft_counts

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in tensors.values()), fast_mode=True)


def check_parts(tensors: dict[str, Tensor], bounds: dict[str, Tensor], impl: str) -> None:
    """Each part with every gradient, those through lse included, which a loss reads where it is finite."""
    tokens = tensors["key"].shape[1]
    batch, queries = tensors["query"].shape[:2]
    indices = torch.zeros(batch, queries, tensors["key"].shape[2], 1, dtype=torch.int32)
    counts = torch.ones(indices.shape[:3], dtype=torch.int32)
    counts[:, ::5] = 0

    def parts(function: Any, **own: Any) -> dict[str, Any]:
        def on(device: torch.device) -> dict[str, Tensor]:
            return {name: bound.to(device) for name, bound in bounds.items()}

        def compressed(query: Tensor, key_compressed: Tensor, value_compressed: Tensor, sinks: Tensor) -> Any:
            sizes = {"compress_size": 16, "num_keys": tokens}
            return function.compressed_attention(query, key_compressed, value_compressed, sinks=sinks, **sizes, **on(query.device), **own)

        def listed(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Any:
            lists = (x.to(query.device) for x in (indices, counts))
            return function.block_sparse_attention(query, key, value, *lists, block_size=32, sinks=sinks, **on(query.device), **own)

        def window(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Any:
            return function.sliding_window_attention(query, key, value, 7, sinks=sinks, **on(query.device), **own)

        return {"compressed": compressed, "listed": listed, "window": window}

    dtype, device = (torch.float64, "cpu") if impl == "torch" else (torch.float32, DEVICE)
    names = {"compressed": ("query", "key_compressed", "value_compressed", "sinks")}
    for name, call in parts(ops, impl=impl).items():
        given = {part: tensors[part] for part in names.get(name, ("query", "key", "value", "sinks"))}
        compare(call, parts(reference)[name], given, dtype, 4, device)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=[*IMPLS[1].marks, pytest.mark.slow])])  # type: ignore[union-attr]
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_parts_match_the_oracle_within_bounds(impl, bounds):
    tensors, where = bounded(bounds)
    check_parts(tensors | {"sinks": SINKS.float()}, where, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_match_the_oracle_when_decoding(impl):
    check_parts(case(**SHAPES["decode-1"], compress_size=16) | {"sinks": SINKS.float()}, {}, impl)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "bounds", "dtype"),
    [("G3-batch", {}, torch.float32), ("", "packed", torch.float32), ("", "both", torch.float32), ("G2-D16", {}, HALF)],
    ids=["batch", "packed", "padded", "half"],
)
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_the_kernels_match_the_oracle(impl, shape, bounds, dtype):
    tensors, where = bounded(bounds) if bounds else (case(compress_size=16, sharpness=1.0, **SHAPES[shape]), {})
    heads = tensors["query"].shape[2]
    tensors = {name: tensors[name] for name in INPUTS} | {"sinks": SINKS[:heads].float()}
    if shape == "G3-batch":
        tensors["query_compressed"] = tensors["query"].flip(1)

    def call(function: Any, **own: Any) -> Any:
        def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            on = {name: bound.to(leaves["query"].device) for name, bound in where.items()}
            result = function(**leaves, **OPTIONS, **on, **own)
            return result.out, result.soft_counts

        return run

    compare(call(ops.dyn_nsa, impl=impl), call(reference.dyn_nsa), tensors, dtype, len(tensors))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_chunks_of_tokens_change_nothing(impl, monkeypatch):
    from tinyonn.ops.nsa import _triton_dyn_nsa

    monkeypatch.setattr(_triton_dyn_nsa, "CHUNK_ELEMENTS", 4 * 16 * 50)
    test_the_kernels_match_the_oracle(impl, "G2-D16", {}, HALF)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_row_that_sees_nothing_is_0_and_its_lse_the_sink(impl):
    tensors = {name: x.to(impl_device(impl)) for name, x in dyn_nsa_case(40, dtype=torch.float32).items()}
    q, k, v, kc, vc = (tensors[name].requires_grad_() for name in INPUTS[:5])
    sinks = SINKS.float().to(q.device).requires_grad_()
    indices = torch.zeros(1, 40, 2, 1, dtype=torch.int32, device=q.device)
    for out, lse in (
        ops.compressed_attention(q, kc, vc, compress_size=32, sinks=sinks, impl=impl)[:2],
        ops.block_sparse_attention(q, k, v, indices, torch.zeros_like(indices[..., 0]), sinks=sinks, impl=impl),
    ):
        assert (out[:, :31] == 0).all()
        assert torch.equal(lse[0, :31], sinks.expand(31, 4))
        grads = torch.autograd.grad(out[:, :31].sum() + lse[:, :31].sum(), [q, sinks])
        assert (grads[0] == 0).all()
        assert (grads[1] == 31).all()


def test_a_low_sink_is_none():
    tensors = dyn_nsa_case(150, compress_size=16)
    low = torch.full((4,), -200.0, dtype=torch.float64)
    ours, plain = ops.dyn_nsa(**tensors, sinks=low, **OPTIONS), ops.dyn_nsa(**tensors, **OPTIONS)
    assert torch.equal(ours.counts, plain.counts)
    assert_close_rms(ours.out, plain.out, 1e-12)
    assert_close_rms(ours.tau, plain.tau, 1e-12)


def test_sinks_are_checked():
    tensors = dyn_nsa_case(40)
    q, k, v, kc, vc = (tensors[name] for name in INPUTS[:5])
    lists = all_blocks(40, 64)
    calls = (
        lambda sinks: ops.dyn_nsa(**tensors, compress_size=32, sinks=sinks),
        lambda sinks: ops.compressed_attention(q, kc, vc, compress_size=32, sinks=sinks),
        lambda sinks: ops.block_sparse_attention(q, k, v, *lists, sinks=sinks),
        lambda sinks: ops.sliding_window_attention(q, k, v, 5, sinks=sinks),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"sinks must have shape \(4,\), got \(3,\)"):
            call(torch.zeros(3))
        with pytest.raises(TypeError, match="sinks must be float16, bfloat16, float32 or float64, got "):
            call(torch.zeros(4, dtype=torch.int64))
    with tinyonn.debug(), pytest.raises(ValueError, match="sinks must not contain NaN"):
        calls[0](torch.full((4,), math.nan))


def test_it_compiles_whole():
    tensors = dyn_nsa_case(100, dtype=torch.float32, compress_size=16) | {"sinks": SINKS.float()}

    def step(**leaves: Tensor) -> Tensor:
        return ops.dyn_nsa(**leaves, softcap=2.0, **OPTIONS).out.square().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        grads.append(torch.autograd.grad(function(**leaves), list(leaves.values())))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
