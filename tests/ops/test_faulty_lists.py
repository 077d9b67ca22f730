"""Lists of key blocks that name what is not there, as -1 in a slot that counts: refused, or NaN for their query; never read."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tinyonn
from tinyonn import ops
from tinyonn.testing import IMPLS, impl_device

FAULTY_LISTS: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "range": (lambda i, c: i.fill_(9), "indices must be 0 … 1 in the sequence of token 0, got 9 in slot 0 of 1"),
    "hole": (lambda i, c: i[0, 70].fill_(-1), "indices must be 0 … 1 in the sequence of token 70, got -1 in slot 0 of 2"),
    "hole between": (lambda i, c: i[0, 70, 0, 1].fill_(-1), "in the sequence of token 70, got -1 in slot 1 of 2"),
    "order": (lambda i, c: i.copy_(i.flip(-1)), "indices must ascend"),
    "counts": (lambda i, c: c.add_(5), "counts must be 0 … 2, got 6 … 7"),
    "negative counts": (lambda i, c: c[0, 3].fill_(-2), "counts must be 0 … 2, got -2 … 2"),
}


def listed(impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, and lists of all key blocks of each query, two slots."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 96, heads, 16, generator=generator) for heads in (2, 1))
    indices = torch.tensor([0, 1], dtype=torch.int32).expand(1, 96, 1, 2).clone()
    device = impl_device(impl)
    return q.to(device), k.to(device), indices.to(device), ((torch.arange(96) >= 64).int()[None, :, None] + 1).to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fault", FAULTY_LISTS)
def test_lists_out_of_range_or_order_are_named(fault, impl):
    change, message = FAULTY_LISTS[fault]
    q, k, indices, counts = listed(impl)
    ops.block_sparse_attention(q, k, k, indices, counts, impl=impl)
    change(indices, counts)
    with tinyonn.debug(q.is_cuda), pytest.raises(ValueError, match=message):
        ops.block_sparse_attention(q, k, k, indices, counts, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_that_do_not_count_may_hold_anything(impl):
    q, k, indices, counts = listed(impl)
    expected = ops.block_sparse_attention(q, k, k, indices, counts, impl=impl)
    indices[0, :64, 0, 1] = -1
    assert all(map(torch.equal, ops.block_sparse_attention(q, k, k, indices, counts, impl=impl), expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fault", ["hole", "hole between", "negative counts"])
def test_where_lists_cannot_be_read_a_faulty_one_gives_nan_to_its_query_alone(fault, impl, monkeypatch):
    """As on a GPU outside of `tinyonn.debug()`."""
    monkeypatch.setattr(importlib.import_module("tinyonn.ops.nsa.block_sparse_attention"), "_lists_are_read", lambda indices: False)
    q, k, indices, counts = listed(impl)
    q.requires_grad_()
    expected, expected_lse = ops.block_sparse_attention(q, k, k, indices, counts, impl=impl)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), q)
    FAULTY_LISTS[fault][0](indices, counts)
    token = 3 if fault == "negative counts" else 70
    out, lse = ops.block_sparse_attention(q, k, k, indices, counts, impl=impl)
    others = torch.arange(96) != token
    (grad,) = torch.autograd.grad(out[:, others].square().sum(), q)
    for got, wanted in ((out, expected), (lse, expected_lse), (grad, expected_grad)):
        torch.testing.assert_close(got[:, others], wanted[:, others])
    assert bool(out[:, token].isnan().all())
    assert bool(lse[:, token].isnan().all())
