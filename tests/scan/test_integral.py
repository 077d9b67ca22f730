"""Sums of one sequence: tokens whose numbers left the range of the precision do not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyonn.scan.engine.integral import lost_tokens, sequence_integral

OFFSETS = torch.tensor([0, 3, 7])
BROKEN = {
    "infinite gradient": lambda a, g: g[2].__setitem__(1, torch.inf),
    "infinite activation": lambda a, g: a[2].__setitem__(4, torch.inf),
    "no gradient": lambda a, g: g[2].fill_(torch.nan),
    "no activation": lambda a, g: a[2].fill_(torch.nan),
}


def planes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(6, 7, generator=generator) + 0.1 for _ in range(2))  # type: ignore[return-value]


def by_hand(activation: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of z(a) − z(g) within each layer, tokens counted, and the mean gradient, a block at a time."""
    total, count, mean = np.zeros(7), np.zeros(7), np.zeros(7)
    for row_a, row_g in zip(activation.astype(np.float64), gradient.astype(np.float64), strict=True):
        for first, last in ((0, 3), (3, 7)):
            known = [b for b in range(first, last) if not np.isnan(row_a[b]) and not np.isnan(row_g[b])]
            if known:
                a, g = row_a[known], row_g[known]
                total[known] += (a - a.mean()) / (a.std() or 1) - (g - g.mean()) / (g.std() or 1)
                count[known] += 1
                mean[known] += g
    return total, count, mean / np.maximum(count, 1)


@pytest.mark.parametrize("name", BROKEN)
def test_a_token_out_of_range_counts_in_no_block(name: str) -> None:
    activation, gradient = planes()
    without = [plane[[0, 1, 3, 4, 5]].numpy() for plane in (activation, gradient)]
    BROKEN[name](activation, gradient)
    found = sequence_integral(activation, gradient, OFFSETS)
    total, count, mean = by_hand(*without)
    np.testing.assert_allclose(found.sps, total, atol=1e-9)
    assert found.count.tolist() == count.tolist() == [5.0] * 7
    np.testing.assert_allclose(found.grad_mean, mean, rtol=1e-12)
    assert lost_tokens(activation, gradient).tolist() == [False, False, True, False, False, False]


def test_a_block_with_one_norm_alone_counts_as_missing() -> None:
    activation, gradient = planes()
    gradient[1, 5] = torch.nan
    activation[4, 0] = torch.nan
    activation[3, 1:3] = gradient[3, 1:3] = torch.nan  # an expert without the token
    found = sequence_integral(activation, gradient, OFFSETS)
    total, count, mean = by_hand(activation.numpy(), gradient.numpy())
    np.testing.assert_allclose(found.sps, total, atol=1e-9)
    assert found.count.tolist() == count.tolist() == [5, 5, 5, 6, 6, 5, 6]
    np.testing.assert_allclose(found.grad_mean, mean, rtol=1e-12)
    assert not lost_tokens(activation, gradient).any()
