"""Loops of DynNSA's kernels as a GPU runs them: it computes addresses of later steps before it knows that there is a first one."""

from __future__ import annotations

import builtins
import importlib
import pkgutil

import pytest
import torch

import tinyonn_kernels.nsa
from tinyonn import ops
from tinyonn.testing import IMPLS, dyn_nsa_case

pytestmark = [*IMPLS[1].marks, pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter shows the bounds of loops")]  # type: ignore[union-attr]
AHEAD = 4  # steps that a pipelined loop looks ahead, at most


@pytest.mark.parametrize("bounds_of", [{}, {"cu_seqlens": [0, 3, 24, 40]}, {"key_end": [24]}], ids=["whole", "packed", "padded"])
def test_no_step_ahead_of_a_loop_passes_32_bits(monkeypatch, bounds_of):
    """Tiles of two queries with 16 heads: the first ones see no compressed key, and padding sees no key at all."""
    bounds: list[tuple[int, int, int]] = []

    def noted(*values: object) -> range:
        numbers = [int(value) for value in values]  # type: ignore[call-overload]
        begin, end, step = (0, numbers[0], 1) if len(numbers) == 1 else (*numbers, 1)[:3]
        bounds.append((begin, end, step))
        return builtins.range(begin, end, step)

    for module in pkgutil.iter_modules(tinyonn_kernels.nsa.__path__):
        monkeypatch.setattr(importlib.import_module(f"tinyonn_kernels.nsa.{module.name}"), "range", noted, raising=False)
    tensors = dyn_nsa_case(40, heads=16, kv_heads=1, dim=16, compress_size=16, dtype=torch.float32)
    tensors |= {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in bounds_of.items()}
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}
    out = ops.dyn_nsa(**leaves, window=8, block_size=16, compress_size=16, max_blocks=3, impl="triton").out
    out.sum().backward()
    empty = [one for one in bounds if one[0] >= one[1]]
    assert len(empty) >= 10
    assert len(bounds) > len(empty)
    wrong = [(begin, end, step) for begin, end, step in bounds if begin + AHEAD * step >= 1 << 31]
    assert not wrong, f"loops (begin, end, step) must stay below 2^31 when they look ahead, got {wrong[:3]}."
