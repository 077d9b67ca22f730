"""Gradient buffers on large pages are ordinary tensors."""

from __future__ import annotations

import mmap

import pytest
import torch

from tinyonn.ops._huge_pages import WORTH_BYTES, empty_on_huge_pages

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
