"""The scan's experts compute what the stock ones do, and its loss is cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tinyonn.hf.interfaces import experts_implementation
from tinyonn.scan.engine.experts import SCAN_EXPERTS, experts_forward
from tinyonn.scan.engine.forward import CHUNK_BYTES, loss_into_gradient_
from tinyonn.testing import tiny_causal_lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_experts_match_the_stock_loop(arch, dtype):
    module = tiny_causal_lm(arch, dtype=dtype).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(19, 48, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(19, module.num_experts, generator=generator).topk(2).indices
    weights = torch.rand(19, 2, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(19, 48, generator=generator).to(dtype)
    expected = type(module).forward.__wrapped__(module, x, index, weights)
    actual = experts_forward(module, x, index, weights)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    for ours, stock in zip(
        (actual, *torch.autograd.grad(actual, (x, weights), upstream)),
        (expected, *torch.autograd.grad(expected, (x, weights), upstream)),
        strict=True,
    ):
        assert (ours - stock).norm() <= tolerance * stock.norm()


def test_empty_slots_add_nothing():
    module = tiny_causal_lm("qwen3_moe").model.layers[0].mlp.experts
    x = torch.randn(4, 48)
    index = torch.tensor([[0, 5], [5, 5], [3, 1], [5, 2]])  # 5 experts: index 5 is an empty slot
    weights = torch.full((4, 2), 0.5)
    out = experts_forward(module, x, index, weights)
    assert (out[1] == 0).all()
    for row in (0, 3):
        slot = int(index[row].argmin())
        alone = experts_forward(module, x[row : row + 1], index[row : row + 1, slot : slot + 1], weights[:1, :1])
        torch.testing.assert_close(out[row : row + 1], alone)
    assert (experts_forward(module, x, torch.full((4, 2), 5), weights) == 0).all()


def test_scan_experts_are_available_to_any_model_by_name():
    model = tiny_causal_lm("qwen3_moe")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        stock = model(tokens).logits
        with experts_implementation(model, SCAN_EXPERTS):
            torch.testing.assert_close(model(tokens).logits, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss_into_gradient_is_cross_entropy_and_its_gradient(dtype):
    vocabulary = CHUNK_BYTES // 4 // 3  # three rows a chunk: seven rows leave a ragged one
    logits = (torch.randn(7, vocabulary) * 4).to(dtype).requires_grad_()
    labels = torch.tensor([0, 5, -1, vocabulary - 1, 3, -1, 7])
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    expected = functional.cross_entropy(wide, labels, ignore_index=-1, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    values = logits.detach().clone()
    loss = loss_into_gradient_(values, labels)
    assert torch.isnan(loss[labels < 0]).all()
    torch.testing.assert_close(loss[labels >= 0], expected[labels >= 0].detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, gradient, rtol=1e-5, atol=1e-7)
    assert (values[labels < 0] == 0).all()
