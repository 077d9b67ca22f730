"""Memory of a step of DynNSA at 64k tokens: computed without data, and measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tinyonn.testing import IMPLS

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that live while operations run on tensors without data."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.note(held)

    def note(self, tensors: Any) -> None:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference_to = StorageWeakRef(storage)
                if reference_to.cdata not in self.live:
                    self.live[reference_to.cdata] = (reference_to, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.note(result)
        return result


LONG = {"G16": (64, 4, False), "G16-packed": (64, 4, True), "G2": (16, 8, False)}
# Of q, k, v, o and their gradients; with more key heads, the float32 sums of their gradients weigh more.
MOST = {"G16": 1.5, "G16-packed": 1.5, "G2": 1.8}


def step_at_64k(device: str, heads: int, kv_heads: int, packed: bool) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Inputs for 64k tokens, D = 128, bfloat16, and forward and backward of them."""
    from tinyonn.ops.nsa import _triton_dyn_nsa
    from tinyonn.ops.nsa._checks import Bounds
    from tinyonn.ops.nsa._tuples import DynNSAInputs, DynNSANumbers, DynNSASaved

    tokens, dim = 1 << 16, 128

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    query, key, value = draw(1, tokens, heads, dim), draw(1, tokens, kv_heads, dim), draw(1, tokens, kv_heads, dim)
    compressed = [draw(1, tokens // 64, kv_heads, dim) for _ in range(2)]
    inputs = DynNSAInputs(query, key, value, *compressed, draw(1, tokens, heads, 3), draw(kv_heads), draw(kv_heads), None, None, None)
    bounds = Bounds(torch.arange(0, tokens + 1, tokens // 8, dtype=torch.int32, device=device)) if packed else Bounds()
    options = DynNSANumbers(512, 1.0, 64, 64, 16, "share", 1, 2, False, dim**-0.5, None)

    def step() -> None:
        results = _triton_dyn_nsa.dyn_nsa_forward(inputs, options, bounds)
        cotangents = (torch.empty_like(results.out).fill_(1e-3), torch.zeros_like(results.soft_counts))
        saved = DynNSASaved(*(getattr(results, name) for name in DynNSASaved._fields[:-2]), *cotangents)
        grads = _triton_dyn_nsa.dyn_nsa_backward(inputs._replace(tau=results.own_tau), saved, options, bounds)
        given = inputs[: DynNSAInputs._fields.index("tau")]
        grads = [grad.to(x.dtype) for grad, x in zip(grads[: len(given)], given, strict=True)]

    return inputs, step


def computed_peak(monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, packed: bool) -> tuple[int, int]:
    """Bytes alive at the worst moment, by what is allocated without data; and q, k, v, o with their gradients. No kernel runs."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    inputs, step = step_at_64k("meta", heads, kv_heads, packed)
    query, key, value = inputs[:3]
    with monkeypatch.context() as patch, Allocations(*inputs) as allocations:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", lambda *args, **options: None)
        step()
    return allocations.peak, 2 * sum(x.numel() * x.element_size() for x in (query, key, value, query))


@pytest.mark.parametrize("long", list(LONG))
def test_peak_memory_at_64k_tokens(long, monkeypatch):
    """Unions of lists are made a chunk at a time, and are of the size of its lists."""
    from tinyonn_kernels.nsa import block_sparse_dq, block_sparse_fwd

    merged = []
    for module in (block_sparse_fwd, block_sparse_dq):
        merge = module.merge_lists
        monkeypatch.setattr(module, "merge_lists", lambda *args, merge=merge: merged.append((args[0], merge(*args))) or merged[-1][1])
    peak, unit = computed_peak(monkeypatch, *LONG[long])
    print(f"peak {peak / 2**30:.2f} GiB, {peak / unit:.3f} of q, k, v, o and their gradients")
    assert peak <= MOST[long] * unit
    assert peak > unit  # it counts
    assert len(merged) >= 4  # chunks, forward and backward
    for indices, found in merged:
        assert found.queries == (8 if long == "G2" else 4)
        if found.queries > 1:
            last = found.queries * indices[0, 0].numel()
            assert found.blocks.numel() == found.members.numel() < indices.numel() + last


@pytest.mark.gpu
@pytest.mark.parametrize("long", list(LONG))
def test_measured_peak_memory_at_64k_tokens(long, monkeypatch):
    peak, unit = computed_peak(monkeypatch, *LONG[long])
    _, step = step_at_64k("cuda", *LONG[long])
    step()  # compiles, and tries configurations, which keeps copies
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated()
    print(f"peak {measured / 2**30:.2f} GiB, computed {peak / 2**30:.2f} GiB")
    assert measured <= MOST[long] * unit
    assert measured <= 1.1 * peak  # sorts and searches have buffers of their own
