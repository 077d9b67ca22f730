"""Tensors of more than 2^31 elements: right where they are held, refused where 32-bit row numbers would not do."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import IMPLS

pytestmark = list(IMPLS[1].marks)  # type: ignore[union-attr]
TOKENS = 40
MAP_NORESERVE = 0x4000


def far_apart(x: Tensor) -> Tensor:
    """The same values with tokens 2^26 elements from each other, in memory that exists only where it is written."""
    stride = 1 << 26
    size = (x.shape[1] * stride + x[0, 0].numel()) * x.element_size()
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = torch.frombuffer(buffer, dtype=x.dtype)
    return flat.as_strided(x.shape, (0, stride, x.shape[3], 1)).copy_(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter shows it without the memory")
@pytest.mark.slow
def test_offsets_pass_32_bits(monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    # On a CPU the interpreter works in place; copying storages onto themselves would touch every page.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, TOKENS, 3, 16), (1, TOKENS, 1, 16), (1, TOKENS, 1, 16), (1, TOKENS // 16, 1, 16), (1, TOKENS // 16, 1, 16)]
    near = [torch.randn(shape, generator=generator) for shape in shapes]
    rest = [torch.randn(1, TOKENS, 3, 3, generator=generator), torch.randn(1, generator=generator), torch.randn(1, generator=generator)]
    grad = torch.randn(shapes[0], generator=generator)
    results = []
    for tensors, cotangent in (([x.clone() for x in near], grad), ([far_apart(x) for x in near], far_apart(grad))):
        leaves = [x.detach().requires_grad_() for x in (*tensors, *rest)]
        result = ops.dyn_nsa(*leaves, block_size=16, compress_size=16, window=9, impl="triton")
        results.append([result.out, *torch.autograd.grad(result.out, leaves, cotangent)])
    assert TOKENS << 26 > 1 << 31
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def without_data(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    ("tokens", "batch", "heads", "kv_heads", "message"),
    [
        (1 << 27, 1, 8, 1, "key must have fewer than 1073741824 rows times query heads of a group .*, got 1073741824"),
        (20, 70000, 2, 1, "key must have at most 65535 heads in all batch rows .*, got 70000"),
    ],
)
def test_what_32_bit_rows_cannot_count_is_refused(tokens, batch, heads, kv_heads, message):
    from tinyonn_kernels.nsa._common import count_heads, geometry_of

    query = without_data(batch, tokens, heads, 16)
    with pytest.raises(ValueError, match=message):
        count_heads(query, kv_heads, geometry_of(query, tokens, None, None, None))


def test_lists_that_32_bit_places_cannot_count_are_refused():
    from tinyonn_kernels.nsa._common import geometry_of
    from tinyonn_kernels.nsa.block_lists import invert_lists

    query = without_data(1, 1 << 20, 16, 16)
    indices, counts = (torch.empty((1, 1 << 20, 16, *slots), dtype=torch.int32, device="meta") for slots in ((128,), ()))
    with pytest.raises(ValueError, match="indices must have fewer than 2147483648 entries and blocks with impl='triton', got 214"):
        invert_lists(indices, counts, geometry_of(query, 1 << 20, None, None, None), 1 << 20, 64)
