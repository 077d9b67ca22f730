"""torch.compile takes every op whole: no graph break, the same values and gradients."""

from __future__ import annotations

import pytest
import torch

from tinyonn.ops import block_norms, integrate_sps, token_grad_norms


def every_op(x: torch.Tensor, scale: torch.Tensor, plane: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    norms = block_norms(x.sin(), row_scale=scale)
    grads = token_grad_norms(x, norms)
    whole = token_grad_norms(x, norms, None, wrt="output")
    total, scores = integrate_sps(norms.detach(), norms.detach().square(), offsets, return_per_token=True)
    with torch.no_grad():
        block_norms(x, out=plane[:, 1:3])
    return norms * 2, grads + 1, whole + 1, total, scores


# The cache on disk is not keyed by an op's backward: with it, an older one might be judged.
@torch.compiler.config.patch(force_disable_caches=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])  # 20 s of g++
def test_compiled_ops_agree_with_eager(backend):
    torch._dynamo.reset()
    x, scale, offsets = torch.randn(5, 100), torch.rand(5), torch.tensor([0, 1, 2])
    results = []
    for function in (every_op, torch.compile(every_op, fullgraph=True, backend=backend)):
        leaf, plane = x.clone().requires_grad_(), torch.zeros(5, 4)
        outputs = function(leaf, scale, plane, offsets)
        outputs[0].sum().backward()
        results.append((*outputs, plane, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
