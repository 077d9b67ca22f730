"""Division of the neurons of an MLP into groups of equal size; neurons that are active together share a group.

N tokens, I neurons, E groups, C = I / E neurons of each
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STEPS = 20  # steps of k-means; assignments hardly change after ten


def neurons_in_order(num_neurons: int, num_groups: int) -> Tensor:
    """(E, C): the first C neurons, the next C, and so on."""
    return torch.arange(num_neurons, device="cpu").view(num_groups, -1)


def coactive_neurons(activations: Tensor, num_groups: int) -> Tensor:
    """Groups of equal size by balanced k-means on the correlation of neurons over a sample of tokens.

    The absolute activations of each neuron are centred over tokens and scaled to length 1, so the product of two neurons is their
    correlation. A group's centre is the direction of its sum. Deterministic: initial centres are neurons drawn with a fixed seed.

    Args:
        activations: (N, I), inputs of the down projection.
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
    """Assignment of rows to groups of equal size. It equals the greedy one, which takes the most similar free pair first.

    Computed by deferred acceptance: each row proposes to the most similar group that has not rejected it, and a group keeps its most
    similar proposals. Rows and groups rank by the same similarity, so the stable assignment is the greedy one.

    Args:
        similarity: (I, E), E divides I.

    Returns:
        (I,) int64, group of each row.

    Source: Gale and Shapley, "College admissions and the stability of marriage", American Mathematical Monthly 69, 1962.
    """
    rows, groups = similarity.shape
    room = rows // groups
    open_similarity = similarity.clone()
    while True:
        value, choice = open_similarity.max(1)
        order = value.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]  # by group, then from most to least similar
        proposals = torch.bincount(choice, minlength=groups)
        rank = torch.arange(rows, device=order.device) - (proposals.cumsum(0) - proposals)[choice[order]]
        rejected = order[rank >= room]
        if not len(rejected):
            return choice
        open_similarity[rejected, choice[rejected]] = -torch.inf
