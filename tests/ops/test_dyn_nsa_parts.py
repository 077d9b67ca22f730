"""The ops that DynNSA is made of: each against the dense oracle, and together the whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops, reference
from tinyonn.testing import assert_close_rms, dyn_nsa_case

INPUTS = ("query", "key", "value", "key_compressed", "value_compressed", "gates", "base", "slope")
IMPLS = ["torch"]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hot_block_chosen_by_every_query(impl):
    tensors = dyn_nsa_case(513)
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
    tensors = dyn_nsa_case(330)
    q, k, v, kc, vc = (tensors[name] for name in INPUTS[:5])
    compressed, lse, entropy = ops.compressed_attention(q, kc, vc, compress_size=32, impl=impl)
    visible = ((torch.arange(330) + 1) // 32).double()[:, None]
    tau = torch.where(visible > 1, entropy.unflatten(-1, (2, 2)).mean(-1) / visible.clamp(min=2).log(), 0.0)
    threshold = tensors["base"] - tensors["slope"] * tau
    selection = ops.select_blocks(q, kc, lse, threshold, compress_size=32, impl=impl)
    selected, _ = ops.block_sparse_attention(q, k, v, *selection[:3], impl=impl)
    near = ops.sliding_window_attention(q, k, v, 50, impl=impl)
    whole = ops.dyn_nsa(**tensors, compress_size=32, window=50, impl=impl)
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
    tensors = dyn_nsa_case(330, queries=queries)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_detached_scores_cost_no_gradient_of_theirs(impl, monkeypatch):
    module = sys.modules[f"tinyonn.ops.nsa.{'_triton_nsa' if impl == 'triton' else '_torch_select'}"]
    original, made = module.select_backward, []

    def spy(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(module, "select_backward", spy)
    tensors = dyn_nsa_case(330)
    q, kc = tensors["query"].requires_grad_(), tensors["key_compressed"].requires_grad_()
    lse = ops.compressed_attention(q, kc, tensors["value_compressed"], compress_size=32)[1].detach()
    threshold = (torch.randn(1, 330, 2, dtype=torch.float64) * 0.3).requires_grad_()
    grads = []
    for detach in (False, True):
        selection = ops.select_blocks(q, kc, lse, threshold, compress_size=32, temperature=1.5, detach_scores=detach, impl=impl)
        leaves = [threshold, q, kc]
        grads.append(torch.autograd.grad(selection.bias.sum() + selection.soft_counts.sum(), leaves, allow_unused=detach))
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[1][0].abs().max() > 0
    assert [grad is None for grad in grads[1]] == [False, True, True]
    assert [[grad is None for grad in run] for run in made] == [[False] * 4, [False, True, True, True]]


@pytest.mark.parametrize("leaves", [("query", "key_compressed", "lse", "threshold"), ("threshold",)], ids=["scores", "threshold alone"])
def test_the_selection_is_an_op_of_torch(leaves):
    tensors = dyn_nsa_case(330)
    lse = ops.compressed_attention(tensors["query"], tensors["key_compressed"], tensors["value_compressed"], compress_size=32)[1]
    tensors |= {"lse": lse, "threshold": torch.full((1, 330, 2), -1.0, dtype=torch.float64)}
    inputs = [tensors[name].detach().requires_grad_(name in leaves) for name in ("query", "key_compressed", "lse", "threshold")]
    options = (1.5, 64, 32, 4, "share", 1, 2, 330, 0.25, 3.0, None, None, None, "torch")
    # Its fourth check, of compilation, cannot add up outputs that begin with integers: that is done below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tinyonn.select_blocks.default, (*inputs, *options), test_utils=checks)

    def loss(*inputs: Tensor) -> Tensor:
        _, _, bias, soft_counts, _ = torch.ops.tinyonn.select_blocks(*inputs, *options)
        return bias.square().sum() + soft_counts.sum()

    wanted = [x for x in inputs if x.requires_grad]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(call(*inputs), wanted) for call in (compiled, loss)), strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(ours, theirs)
