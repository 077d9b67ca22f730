"""Each kernel once, against PyTorch: what a version of Triton must pass to be supported. `make test-lowest` runs it with the lowest one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import IMPLS, assert_close_rms, impl_device

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
DEVICE = impl_device("triton")


def defined() -> set[str]:
    """Names of all kernels."""
    import tinyonn_kernels

    modules = pkgutil.walk_packages(tinyonn_kernels.__path__, "tinyonn_kernels.")
    return {name for module in modules for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """Names of the kernels that run."""
    from tinyonn_kernels import statistics

    kind = type(importlib.import_module(f"{statistics.__name__}.block_norms")._block_norms_kernel)
    found: set[str] = set()
    original = kind.run

    def run(self: Any, *args: Any, **named: Any) -> Any:
        found.add(self.fn.__name__)
        return original(self, *args, **named)

    monkeypatch.setattr(kind, "run", run)
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def statistics(impl: str) -> list[Tensor]:
    query, key = draw(1, 20, 4, 16), draw(1, 20, 2, 16, seed=1)
    found = ops.attention_stats(query, key, span_mask=torch.arange(20, device=DEVICE)[None] < 7, impl=impl)
    return [
        ops.block_norms(draw(6, 70), impl=impl),
        ops.token_grad_norms(draw(6, 33), draw(6, 70, seed=1), impl=impl),
        ops.integrate_sps(draw(12, 5).abs(), draw(12, 5, seed=1).abs(), [0, 2, 5], impl=impl),
        *(part for part in found if part is not None),
    ]


def attention(impl: str) -> list[Tensor]:
    tokens, heads, kv_heads, dim, size = 160, 4, 2, 16, 16
    leaves = [draw(1, tokens, count, dim, seed=seed).requires_grad_() for seed, count in enumerate((heads, kv_heads, kv_heads))]
    leaves += [draw(1, tokens // size, kv_heads, dim, seed=3 + seed).requires_grad_() for seed in range(2)]
    leaves += [draw(1, tokens, heads, 3, seed=5).requires_grad_(), torch.full((kv_heads,), -3.0, device=DEVICE).requires_grad_()]
    leaves += [torch.zeros(kv_heads, device=DEVICE).requires_grad_()]
    result = ops.dyn_nsa(*leaves, block_size=16, compress_size=size, window=20, max_blocks=10, temperature=1.0, impl=impl)
    loss = (result.out * draw(*result.out.shape, seed=6)).sum() + result.soft_counts.sum()
    return [result.out, result.counts.float(), *torch.autograd.grad(loss, leaves)]


def experts(impl: str) -> list[Tensor]:
    tokens, features, number, neurons, slots = 40, 20, 5, 16, 3
    leaves = [draw(tokens, features), draw(number, 2 * neurons, features, seed=1), draw(number, features, neurons, seed=2)]
    index = torch.rand(tokens, number, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :slots].to(DEVICE)
    leaves += [draw(tokens, slots, seed=4).sigmoid(), torch.zeros(tokens, slots, device=DEVICE)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = ops.expert_mlp(*leaves[:3], index, leaves[3], surprise=leaves[4], surprise_kind="expert", impl=impl)
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=5)).sum(), leaves)]


def test_every_kernel_runs_and_is_right(launched, monkeypatch):
    from tinyonn_kernels.nsa import block_lists

    monkeypatch.setattr(block_lists, "MIN_SEGMENT", 16)  # several programs share a block
    monkeypatch.setattr(block_lists, "MANY_SEGMENTS", 10**6)
    for work in (statistics, attention, experts):
        for number, (got, wanted) in enumerate(zip(work("triton"), work("torch"), strict=True)):
            assert_close_rms(got, wanted.double(), torch.float32, f"{work.__name__}, result {number}")
    assert launched == defined()
