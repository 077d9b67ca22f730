"""Gradient buffers on large pages are ordinary tensors."""

from __future__ import annotations

import math
import mmap
import os
import pickle

import pytest
import torch

from tinyonn.ops.experts._huge_pages import WORTH_BYTES, empty_on_huge_pages

LARGE = (3, WORTH_BYTES // 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), LARGE, (0, 5)])
def test_it_has_the_shape_asked_for_and_takes_values(shape, dtype):
    found = empty_on_huge_pages(shape, torch.empty(0, dtype=dtype))
    assert found.shape == shape
    assert found.dtype == dtype
    assert found.is_contiguous()
    found.fill_(3)
    copy = found.clone()
    del found
    assert (copy == 3).all()


def test_what_needs_a_buffer_outlives_the_name_of_it():
    found = empty_on_huge_pages(LARGE, torch.empty(0)).fill_(2)
    row = found[2]
    del found
    assert row.sum() == 2 * len(row)


def test_a_system_that_refuses_gets_ordinary_memory(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("out of maps")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert empty_on_huge_pages(LARGE, torch.empty(0)).fill_(1).sum() == LARGE[0] * LARGE[1]


def test_a_step_of_an_optimiser_and_a_file_take_it(tmp_path):
    weight = torch.nn.Parameter(torch.ones(LARGE))
    weight.grad = empty_on_huge_pages(LARGE, weight).fill_(1)
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0).step()
    torch.save(weight.grad, tmp_path / "grad.pt")
    torch.testing.assert_close(weight, torch.full(LARGE, 0.9))
    assert (torch.load(tmp_path / "grad.pt") == 1).all()


def test_memory_is_given_back():
    """A hundred times what stays, in maps of this process."""

    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    size = math.prod(LARGE) * 4
    kept = empty_on_huge_pages(LARGE, torch.empty(0)).fill_(1)
    before = mapped()
    for _ in range(100):
        empty_on_huge_pages(LARGE, torch.empty(0)).fill_(1)
    assert mapped() - before < 5 * size
    assert kept.sum() == kept.numel()


def test_it_can_be_shared_copied_and_sent():
    found = empty_on_huge_pages(LARGE, torch.empty(0)).fill_(2)
    assert torch.equal(pickle.loads(pickle.dumps(found)), found)
    shared = found.clone().share_memory_(), found.share_memory_()
    assert all(x.is_shared() for x in shared)
    assert torch.equal(*shared)


def test_its_storage_cannot_grow_and_a_copy_can():
    """As of every tensor over memory that is not torch's own."""
    found = empty_on_huge_pages(LARGE, torch.empty(0)).fill_(2)
    copy, number = found.clone(), found.numel()
    with pytest.raises(RuntimeError, match="not resizable"):
        found.resize_(2 * number)
    assert (copy.resize_(2 * number)[:number] == 2).all()
