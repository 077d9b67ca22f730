"""`sliding_window_attention` over many packed sequences, and rows after the last, which belong to none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyonn import ops
from tinyonn.testing import IMPLS, assert_close_rms, impl_device


def by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int) -> Tensor:
    """Softmax written out, in float64, one sequence after another."""
    group = query.shape[2] // key.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    begin = 0
    for length in lengths:
        q, k, v = (x[0, begin : begin + length].double().cpu() for x in (query, key, value))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * query.shape[3] ** -0.5
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        out = torch.cat([out[:, :begin], torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)[None], out[:, begin + length :]], 1)
        begin += length
    return out


LENGTHS = {
    "short": [3, 1, 7, 7, 2, 5, 0, 4, 1, 1, 6],
    "equal": [16] * 12,
    "one long": [5, 300, 2, 9, 0, 3],
    "one": [37],
    "none": [0, 0],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", [0, 11])
@pytest.mark.parametrize("window", [4, 1000])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_sequences_and_rows_that_belong_to_none(lengths, window, tail, impl):
    device = impl_device(impl)
    if impl == "triton" and (sum(lengths) > 100 or window == 4) and device == "cpu":
        pytest.skip("takes long in the interpreter")
    total = sum(lengths) + tail
    generator = torch.Generator().manual_seed(total)
    query, key, value = (torch.randn(1, total, heads, 16, generator=generator).to(device).requires_grad_() for heads in (4, 2, 2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    out = ops.sliding_window_attention(query, key, value, window, cu_seqlens=bounds, impl=impl)
    exact = [x.detach().cpu().double().requires_grad_() for x in (query, key, value)]
    expected = by_hand(*exact, lengths, window)
    assert (out[:, sum(lengths) :] == 0).all()
    if not sum(lengths):
        return
    assert_close_rms(out, expected, 1e-5, "output")
    cotangent = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, (query, key, value), cotangent.to(device))
    for name, grad, right in zip("qkv", grads, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        assert_close_rms(grad, right, 1e-5, name)
        assert (grad[:, sum(lengths) :] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_token_that_is_not_finite_stays_in_its_sequence(impl):
    lengths = [4, 6, 5]
    query, key, value = (torch.randn(1, 15, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    clean = by_hand(query, key, value, lengths, 100)
    value[0, 7] = torch.nan
    key[0, 7] = torch.inf
    out = ops.sliding_window_attention(query, key, value, 100, cu_seqlens=torch.tensor([0, 4, 10, 15]), impl=impl)
    assert out[0, 7:10].isnan().all()
    assert_close_rms(torch.cat([out[:, :7], out[:, 10:]], 1), torch.cat([clean[:, :7], clean[:, 10:]], 1), 1e-5, "others")


def test_bounds_beyond_the_rows_are_refused():
    x = torch.randn(1, 8, 1, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to at most 8, got \[0, 9\]"):
        ops.sliding_window_attention(x, x, x, 4, cu_seqlens=torch.tensor([0, 9]))
