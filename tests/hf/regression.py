"""A Poisson regression of effects on estimated shares, written out: the oracle of `fitting`."""

from __future__ import annotations

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor, Tensor]  # x, effect, weight


def regression(features: Tensor, y: Tensor, weight: Tensor, towards: Tensor, ridge: Tensor) -> Tensor:
    """Coefficients of a Poisson regression with a log link and a ridge, by Newton's method on all of them, damped."""

    def objective(b: Tensor) -> Tensor:
        return (weight * (y * (features @ b) - (features @ b).exp())).sum() - (ridge * (b - towards).square()).sum() / 2

    b = towards.clone()
    for _ in range(300):
        mean = (features @ b).exp()
        slope = features.T @ (weight * (y - mean)) - ridge * (b - towards)
        step = torch.linalg.solve((features.T * (weight * mean)) @ features + torch.diag(ridge), slope)
        size = 1.0
        while objective(b + size * step) < objective(b) and size > 1e-9:
            size /= 2
        b = b + size * step
    return b


def by_hand(heads: list[Pairs]) -> tuple[Tensor, Tensor]:
    """a and β of each head: first one β of all, with a level for each head, then each head on its own with a ridge towards that β."""
    means = [(head[2] * head[1]).sum() / head[2].sum() for head in heads]
    count = len(heads)
    features = torch.cat([
        torch.cat([torch.nn.functional.one_hot(torch.tensor([h] * len(head[0])), count).double(), head[0][:, None]], 1)
        for h, head in enumerate(heads)
    ])  # fmt: skip
    y, weight = (
        torch.cat([head[1] / mean for head, mean in zip(heads, means, strict=True)]),
        torch.cat([head[2] * len(head[0]) / head[2].sum() for head in heads]),
    )
    zeros = torch.zeros(count, dtype=torch.float64)
    shared = regression(features, y, weight, torch.cat([zeros, zeros.new_tensor([1.3])]), torch.cat([zeros, zeros.new_tensor([5.0])]))[-1]
    found = []
    for head, mean in zip(heads, means, strict=True):
        features = torch.stack([torch.ones_like(head[0]), head[0]], 1)
        weight = head[2] * len(head[0]) / head[2].sum()
        level, power = regression(features, head[1] / mean, weight, zeros.new_tensor([0.0, shared.item()]), zeros.new_tensor([0.0, 5.0]))
        found.append(torch.stack([level + mean.log(), power]))
    return tuple(torch.stack(found).T)
