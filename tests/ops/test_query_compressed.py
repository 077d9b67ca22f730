"""A query of its own for the compressed branch and the selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import IMPLS as ALL
from tinyonn.testing import assert_close_rms, dtype_id, dyn_nsa_case, impl_device

from .dyn_nsa_cases import HALF, compare, partly_open

OPTIONS = {"block_size": 32, "compress_size": 16, "window": 40, "temperature": 1.5, "max_blocks": 8}
TRITON = pytest.param("triton", marks=[*ALL[1].marks, pytest.mark.slow])
GATES = {"selected": [0.0, 1.0, 0.0], "compressed": [1.0, 0.0, 0.0], "window": [0.0, 0.0, 1.0]}


def case(tokens: int = 130, **options: Any) -> dict[str, Tensor]:
    """The query of the compressed branch is the sharp one of `dyn_nsa_case`; the other is independent of it."""
    tensors = dyn_nsa_case(tokens, compress_size=16, **options)
    drawn = torch.randn(tensors["query"].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {**tensors, "query": drawn.to(tensors["query"].dtype), "query_compressed": tensors["query"]}


def check_whole(impl: str, dtype: torch.dtype, tensors: dict[str, Tensor], bounds: dict[str, Tensor], **options: Any) -> None:
    """Outputs and every gradient against the oracle; counts must be equal in float32."""
    device = impl_device("triton") if impl == "triton" else "cpu"
    counts = []

    def call(function: Any, **own: Any) -> Any:
        def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
            where = {name: bound.to(leaves["query"].device) for name, bound in bounds.items()}
            result = function(**leaves, **OPTIONS, **options, **where, **own)
            counts.append(result.counts.cpu())
            return result.out, result.soft_counts

        return run

    compare(call(ops.dyn_nsa, impl=impl), call(reference.dyn_nsa), tensors, dtype, len(tensors), device)
    assert dtype == HALF or torch.equal(*counts)


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
def test_the_whole_is_exact(detach_scores, impl):
    tensors = case(dtype=torch.float32)
    scoring = {**tensors, "query": tensors["query_compressed"]}
    assert partly_open(scoring, OPTIONS) >= 0.2
    check_whole(impl, torch.float32, tensors, {}, detach_scores=detach_scores)


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("where", ["packed", "decoding"])
def test_within_bounds(where, impl):
    packed = {"cu_seqlens": torch.tensor([0, 37, 38, 130], dtype=torch.int32)} if where == "packed" else {}
    check_whole(impl, torch.float32, case(queries=50 if where == "decoding" else None, dtype=torch.float32), packed)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=dtype_id)
@pytest.mark.parametrize("impl", [TRITON])
def test_chunks_of_tokens_change_nothing(impl, dtype, monkeypatch):
    """In half precision both sums of a chunk share one float32 scratch."""
    from tinyonn.ops.nsa import _triton_dyn_nsa

    monkeypatch.setattr(_triton_dyn_nsa, "CHUNK_ELEMENTS", 4 * 16 * 50)
    check_whole(impl, dtype, case(100, sharpness=1.0, dtype=torch.float32), {})


def test_gradcheck():
    sizes = {"heads": 2, "kv_heads": 1, "dim": 3, "queries": 20, "seed": 3, "sharpness": 6.0}
    tensors = case(84, **sizes)
    options = {"block_size": 16, "compress_size": 16, "window": 7, "max_blocks": 5, "temperature": 2.0}
    assert partly_open({**tensors, "query": tensors["query_compressed"]}, options) >= 0.2
    tau = torch.rand(1, 20, 1, dtype=torch.float64)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        result = ops.dyn_nsa(**dict(zip(tensors, leaves, strict=True)), tau=tau, **options)
        return result.out, result.soft_counts

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in tensors.values()), fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_it_is_the_query_of_two_parts(impl):
    """Composed of the parts: compressed attention and selection by one query, blocks and window by the other."""
    tensors = case(330)
    q, k, v, kc, vc, gates, base, slope, scoring = tensors.values()
    sizes = {"block_size": 32, "compress_size": 16, "temperature": 1.5, "max_blocks": 8}
    compressed, lse, _ = ops.compressed_attention(scoring, kc, vc, compress_size=16, num_keys=330)
    tau = ops.dyn_nsa(scoring, k, v, kc, vc, gates, base, slope, **OPTIONS).tau
    selection = ops.select_blocks(scoring, kc, lse, base - slope * tau, num_keys=330, **sizes)
    selected, _ = ops.block_sparse_attention(q, k, v, *selection[:3], block_size=32)
    near = ops.sliding_window_attention(q, k, v, 40)
    whole = ops.dyn_nsa(**tensors, **OPTIONS, impl=impl)
    assert_close_rms(whole.out, gates[..., :1] * compressed + gates[..., 1:2] * selected + gates[..., 2:] * near, 1e-12)
    assert torch.equal(whole.counts, selection.counts)
    assert not torch.equal(whole.counts, ops.dyn_nsa(q, k, v, kc, vc, gates, base, slope, **OPTIONS).counts)
    assert_close_rms(whole.tau, tau, 1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_none_is_the_query_itself(impl):
    """Given twice, the query's gradient comes in two parts."""
    tensors = dyn_nsa_case(130, compress_size=16)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    alone = ops.dyn_nsa(**leaves, **OPTIONS, impl=impl)
    (expected,) = torch.autograd.grad(alone.out.square().sum() + alone.soft_counts.sum(), leaves["query"])
    copy = tensors["query"].clone().requires_grad_()
    twice = ops.dyn_nsa(**leaves, query_compressed=copy, **OPTIONS, impl=impl)
    assert torch.equal(alone.out, twice.out)
    parts = torch.autograd.grad(twice.out.square().sum() + twice.soft_counts.sum(), [leaves["query"], copy])
    assert all(part.abs().max() > 0 for part in parts)
    assert_close_rms(sum(parts), expected, 1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("branch", list(GATES))
@pytest.mark.parametrize("detach_scores", [False, True], ids=["scores", "detached"])
def test_detached_scores_cut_its_gradient_in_the_selection_alone(detach_scores, branch, impl):
    tensors = case()
    tensors["gates"] = torch.tensor(GATES[branch], dtype=torch.float64).expand(1, 130, 4, 3)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = ops.dyn_nsa(**leaves, **OPTIONS, detach_scores=detach_scores, impl=impl).out
    mine, other = torch.autograd.grad(out.square().sum(), [leaves["query_compressed"], leaves["query"]], materialize_grads=True)
    assert bool(mine.abs().max() > 0) == (branch == "compressed" or (branch == "selected" and not detach_scores))
    assert bool(other.abs().max() > 0) == (branch != "compressed")


def test_a_query_that_needs_no_gradient_gets_none():
    tensors = case()
    tensors["query"].requires_grad_()
    result = ops.dyn_nsa(**tensors, **OPTIONS)
    result.out.sum().backward()
    assert tensors["query"].grad is not None
    assert tensors["query_compressed"].grad is None
