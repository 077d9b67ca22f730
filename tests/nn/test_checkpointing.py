"""Checkpointed layers: recomputed to the same bits, and with `keep_selection` not recomputed at all."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tinyonn import ops
from tinyonn.nn import DynNSAAttention, DynNSAOptions, keep_selection
from tinyonn.testing import tiny_causal_lm


@pytest.fixture
def forwards(monkeypatch):
    """How often DynNSA ran forward, and what it selected."""
    module = importlib.import_module("tinyonn.ops.nsa._torch_dyn_nsa")
    original, seen = module.dyn_nsa_forward, []

    def forward(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(module, "dyn_nsa_forward", forward)
    return seen


def layer() -> DynNSAAttention:
    torch.manual_seed(0)
    options = DynNSAOptions(compress_size=16, block_size=16, window=16, max_blocks=6, budget_weight=1.0)
    return DynNSAAttention(64, 4, 2, options=options).train()


@pytest.mark.parametrize(("options", "runs"), [({}, 2), ({"context_fn": keep_selection}, 1)], ids=["recomputed", "kept"])
def test_a_checkpointed_layer_has_the_same_gradients(forwards, options, runs):
    module, x = layer(), torch.randn(2, 150, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, *module.parameters()]

    def gradients(call):
        result = call(x)
        return torch.autograd.grad(result.out.square().sum() + result.budget_loss, leaves)

    expected = gradients(module)
    forwards.clear()
    got = gradients(lambda x: checkpoint(module, x, use_reentrant=False, **options))
    assert len(forwards) == runs
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for run in forwards[1:]:
        for a, b in zip(run, forwards[0], strict=True):
            assert torch.equal(a, b)


def test_a_checkpointed_layer_compiles_whole():
    module, x = layer(), torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, *module.parameters()]

    def step(x):
        result = checkpoint(module, x, use_reentrant=False)
        return result.out.square().sum() + result.budget_loss

    grads, statistics = [], []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        module.core.reset_statistics()
        grads.append(torch.autograd.grad(call(x), leaves))
        statistics.append(module.core.statistics())
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert statistics[1] == pytest.approx(statistics[0])


def test_selection_by_itself_is_kept_too():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 96, heads, 16, generator=generator, requires_grad=True) for heads in (4, 2))
    value, threshold = torch.randn(1, 96, 2, 16, generator=generator), torch.zeros(1, 96, 2, requires_grad=True)
    seen = []

    def attend(query, key, threshold):
        compressed = key.unflatten(1, (-1, 16)).mean(2)
        _, lse, _ = ops.compressed_attention(query, compressed, value[:, :6], compress_size=16, num_keys=96)
        selection = ops.select_blocks(query, compressed, lse, threshold, block_size=16, compress_size=16, max_blocks=4, num_keys=96)
        seen.append(selection.indices)
        out, _ = ops.block_sparse_attention(query, key, value, selection.indices, selection.counts, selection.bias, block_size=16)
        return out.square().sum()

    leaves = (query, key, threshold)
    expected = torch.autograd.grad(attend(*leaves), leaves)
    seen.clear()
    got = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False, context_fn=keep_selection), leaves)
    assert len(seen) == 2
    assert seen[0].data_ptr() == seen[1].data_ptr()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_converted_model_keeps_its_selection(forwards):
    from tinyonn.hf import convert_attention

    ids = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(0))
    grads = []
    for kept in (False, True):
        model = convert_attention(tiny_causal_lm("llama"), block_size=16, compress_size=16, window=16).train()
        model.gradient_checkpointing_enable({"use_reentrant": False, **({"context_fn": keep_selection} if kept else {})})
        forwards.clear()
        model(ids, labels=ids).loss.backward()
        layers = model.config.num_hidden_layers
        assert len(forwards) == (layers if kept else 2 * layers)
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
