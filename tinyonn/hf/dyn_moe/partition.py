"""Neurons of an MLP into equal groups: those that are active together into one.

N tokens, I neurons, E groups, C = I / E neurons of each
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STEPS = 20  # of k-means; assignments hardly change after ten


def neurons_in_order(num_neurons: int, num_groups: int) -> Tensor:
    """(E, C): the first C neurons, the next C, and so on."""
    return torch.arange(num_neurons, device="cpu").view(num_groups, -1)


def coactive_neurons(activations: Tensor, num_groups: int) -> Tensor:
    """Balanced k-means of neurons by how their strengths rise and fall together over a sample of tokens.

    Each neuron's strengths |a| are centred over tokens and scaled to length 1, so that the product of two neurons is their correlation.
    A group's centre is the direction of its sum. Deterministic: centres start from neurons drawn with a fixed seed.

    Args:
        activations: (N, I), what enters the down projection.
        num_groups: E, which divides I.

    Returns:
        (E, C) neuron indices, ascending within a group.

    Source: experts by co-activation after Zhang et al., "MoEfication", arXiv:2110.01786, with balanced k-means in place of its graph
    partition.
    """
    strength = activations.abs().float()
    profiles = functional.normalize((strength - strength.mean(0)).T, dim=-1)  # (I, N)
    generator = torch.Generator().manual_seed(0)
    start = torch.randperm(len(profiles), generator=generator, device="cpu")[:num_groups].to(profiles.device)
    centres = profiles[start]
    groups = start.new_empty(0)
    for _ in range(STEPS):
        found = balanced_assignment(profiles @ centres.T)
        if torch.equal(found, groups):
            break
        groups = found
        sums = torch.zeros_like(centres).index_add_(0, groups, profiles)
        centres = functional.normalize(sums, dim=-1)
    return groups.argsort(stable=True).view(num_groups, -1)


def balanced_assignment(similarity: Tensor) -> Tensor:
    """A group for each row, equally many rows in each: the most similar pair first, as long as the group has room.

    All pairs are settled together: each row asks the group it likes best of those that have not turned it away, and a group keeps the
    most similar of those that ask. Both sides rank by one similarity, so this ends where taking pairs one by one would.

    Args:
        similarity: (I, E), E divides I.

    Returns:
        (I,) int64.
    """
    rows, groups = similarity.shape
    room = rows // groups
    wishes = similarity.clone()
    while True:
        value, choice = wishes.max(1)
        order = value.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]  # by group, within it from the most similar on
        asked = torch.bincount(choice, minlength=groups)
        rank = torch.arange(rows, device=order.device) - (asked.cumsum(0) - asked)[choice[order]]
        refused = order[rank >= room]
        if not len(refused):
            return choice
        wishes[refused, choice[refused]] = -torch.inf
