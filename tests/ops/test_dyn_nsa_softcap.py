"""Bounded scores, as in Gemma 2, in every op of DynNSA: against transformers' eager attention, and against the dense oracle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tinyonn import ops, reference
from tinyonn.testing import IMPLS, assert_close_rms, dyn_nsa_case, impl_device

from .dyn_nsa_cases import BOUNDS, HALF, INPUTS, all_blocks, attentions, bounded, case, compare, partly_open

TOKENS = 70
OPTIONS: dict[str, Any] = {"block_size": 32, "compress_size": 16, "window": 40, "temperature": 1.5, "max_blocks": 8}


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("name", ["dyn_nsa", "block_sparse_attention", "sliding_window_attention"])
def test_all_keys_are_gemma_2s_eager_attention(impl, name):
    tensors = dyn_nsa_case(TOKENS, dtype=torch.float32, sharpness=16.0)
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    hidden = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (x.double().transpose(1, 2) for x in (query, key, value))
        return eager_attention_forward(module, *heads_first, hidden, scaling=0.4, softcap=2.0)[0]

    results = []
    for function, device in ((attentions(impl, TOKENS, scale=0.4, softcap=2.0)[name], impl_device(impl)), (eager, "cpu")):
        leaves = [tensors[part].to(device).requires_grad_() for part in INPUTS[:3]]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.double().pow(3).sum(), leaves)))
    for part, ours, theirs in zip(("out", *INPUTS[:3]), *results, strict=True):
        assert_close_rms(ours, theirs, 2e-5, part)


@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
@pytest.mark.parametrize("queries", [330, 9], ids=["all", "decode"])
def test_every_gradient_is_exact(detach_scores, queries):
    tensors = dyn_nsa_case(compress_size=16, queries=queries)
    tau = torch.rand(1, queries, 2, dtype=torch.float64)
    if queries == 330:
        assert partly_open(tensors, {**OPTIONS, "softcap": 2.0}) >= 0.2
    results = []
    for function in (ops.dyn_nsa, reference.dyn_nsa):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        result = function(**leaves, tau=tau, softcap=2.0, detach_scores=detach_scores, **OPTIONS)
        loss = result.out.pow(3).sum() + result.soft_counts.square().sum()
        results.append((result.out, result.soft_counts, *torch.autograd.grad(loss, list(leaves.values()))))
    for name, ours, theirs in zip(("out", "soft_counts", *tensors), *results, strict=True):
        assert theirs.abs().max() > 0
        assert_close_rms(ours, theirs, 1e-11, name)


def test_gradcheck():
    tensors = dyn_nsa_case(tokens=84, heads=2, kv_heads=1, dim=3, queries=20, compress_size=16, seed=3, sharpness=6.0)
    tau = torch.rand(1, 20, 1, dtype=torch.float64)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        sizes = {"block_size": 16, "compress_size": 16, "window": 7, "max_blocks": 5, "temperature": 2.0}
        result = ops.dyn_nsa(*leaves, tau=tau, softcap=1.0, **sizes)
        return result.out, result.soft_counts

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in tensors.values()), fast_mode=True)


def test_lse_and_entropy_are_those_of_the_bounded_scores():
    """Every result of the parts, and gradients through lse, which the next part reads."""
    tensors = dyn_nsa_case(200, compress_size=16)
    lists = all_blocks(200, 32)
    bias = torch.randn(lists[0].shape, dtype=torch.float64)
    results = []
    for function in (ops, reference):
        q, k, v, kc, vc = leaves = [tensors[name].clone().requires_grad_() for name in INPUTS[:5]]
        _, compressed_lse, entropy = function.compressed_attention(q, kc, vc, compress_size=16, num_keys=200, softcap=2.0)
        _, lse = function.block_sparse_attention(q, k, v, *lists, bias, block_size=32, softcap=2.0)
        finite = compressed_lse[:, 15:]
        grads = torch.autograd.grad(finite.square().sum() + lse.square().sum(), leaves, materialize_grads=True, allow_unused=True)
        results.append((compressed_lse, entropy, lse, *grads))
    for name, ours, theirs in zip(("compressed lse", "entropy", "lse", *INPUTS[:5]), *results, strict=True):
        assert_close_rms(ours, theirs, 1e-11, name)


def check_whole(tensors: dict[str, Tensor], bounds: dict[str, Tensor], softcap: float, dtype: torch.dtype = torch.float32) -> None:
    """By Triton: out and soft_counts with every gradient."""

    def call(function: Any, **own: Any) -> Any:
        def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            where = {name: bound.to(leaves["query"].device) for name, bound in bounds.items()}
            result = function(**leaves, softcap=softcap, **OPTIONS, **where, **own)
            return result.out, result.soft_counts

        return run

    compare(call(ops.dyn_nsa, impl="triton"), call(reference.dyn_nsa), {name: tensors[name] for name in INPUTS}, dtype, 8)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [1.0, pytest.param(1e4, id="far above the scores")])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_the_kernels_match_the_oracle(impl, softcap):
    check_whole(case(70, compress_size=16), {}, softcap)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_the_kernels_within_bounds(impl, bounds):
    check_whole(*bounded(bounds), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_the_kernels_in_half_precision(impl):
    check_whole(case(70, dim=100, compress_size=16, sharpness=1.0), {}, 1.0, HALF)


def test_no_softcap_is_none_not_0():
    tensors = dyn_nsa_case(40)
    q, k, v, kc, vc = (tensors[name] for name in INPUTS[:5])
    lists, lse, threshold = all_blocks(40, 64), torch.zeros(q.shape[:3]), torch.zeros(1, 40, 2)
    for call in (
        lambda: ops.dyn_nsa(**tensors, compress_size=32, softcap=0),
        lambda: ops.compressed_attention(q, kc, vc, compress_size=32, softcap=0),
        lambda: ops.select_blocks(q, kc, lse, threshold, compress_size=32, softcap=0),
        lambda: ops.block_sparse_attention(q, k, v, *lists, softcap=0),
        lambda: ops.sliding_window_attention(q, k, v, 5, softcap=0),
    ):
        with pytest.raises(ValueError, match="softcap must be above 0, got 0"):
            call()
