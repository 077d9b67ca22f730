"""Scores of attention heads: a registry of functions from what one layer did with one batch to one value a sample and head.

For every score, higher is more. A score of one's own is one function and one call; it then has columns in the files, and a weight in
the fusion, wherever `extra_weights` names it:

    from tinyonn.heads.score.scores import Observation, register_score

    def largest_feature(seen: Observation) -> torch.Tensor:
        return seen.mean(seen.outputs.abs().amax(-1))  # (B, Tq, H) → (B, H)

    register_score("peak", largest_feature)
    score_heads(ScoreConfig(..., extra_weights={"peak": 0.25}))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, did_you_mean
from ..capture.layers import AttentionLayer


@dataclass(frozen=True)
class Observation:
    """What one layer did with one batch. B samples, Tq queries (1 where only each sample's last token is looked at), H heads, D head dim.

    Attributes:
        layer: whose heads they are.
        outputs: (B, Tq, H, D) in the model's dtype: each head's slice of the input of the output projection.
        entropy: (B, Tq, H) of the attention, in nats.
        span_mass: (B, Tq, H), share of the attention on the question's tokens; 0 in samples whose question was lost.
        counted: (B, Tq) bool, False for padding.
        gram: (H, D, D) float64, W_hᵀ W_h of each head's slice W_h (F, D) of the output projection, where output norms are taken after
            it; else None.
    """

    layer: AttentionLayer
    outputs: Tensor
    entropy: Tensor
    span_mass: Tensor
    counted: Tensor
    gram: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean over a sample's tokens without padding, in float64: (B, Tq, H) → (B, H)."""
        counted = self.counted[..., None]
        return torch.where(counted, values.double(), 0.0).sum(1) / counted.sum(1)


class Score(NamedTuple):
    """A registered score.

    Attributes:
        function: from an Observation to (B, H).
        needs_span: whether samples whose question was lost have no value.
    """

    function: Callable[[Observation], Tensor]
    needs_span: bool


def output_norm(seen: Observation) -> Tensor:
    """`out`: L2 norm of a head's output; with `gram`, of its share of the output projection's output (bias left out), ‖W_h x‖."""
    x = seen.outputs.double()
    if seen.gram is None:
        return seen.mean(x.norm(dim=-1))
    squared = (torch.einsum("bthd,hde->bthe", x, seen.gram) * x).sum(-1)
    return seen.mean(squared.clamp_min(0).sqrt())


def concentration(seen: Observation) -> Tensor:
    """`ent`: negative entropy of a head's attention, in nats; 0 where all of it is on one token.

    Source: entropy of heads as in Clark et al., "What does BERT look at?", arXiv:1906.04341.
    """
    return seen.mean(-seen.entropy)


def question_mass(seen: Observation) -> Tensor:
    """`task`: share of a head's attention that is on the question, 0 … 1."""
    return seen.mean(seen.span_mass)


SCORES: dict[str, Score] = {
    "out": Score(output_norm, False),
    "ent": Score(concentration, False),
    "task": Score(question_mass, True),
}
BASE_SCORES = tuple(SCORES)


def register_score(name: str, function: Callable[[Observation], Tensor], *, needs_span: bool = False) -> None:
    """Makes a score available by its name.

    Args:
        name: lower-case letters, digits and `_`; a column's name begins with it.
        function: from an Observation to (B, H); `Observation.mean` takes the mean over tokens. Higher should be more.
        needs_span: whether it reads `span_mass`: samples whose question was lost are then left out of its mean.

    Raises:
        ValueError: the name is taken by another function, or has other characters.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and '_', got {name!r}.")
    if name in SCORES and SCORES[name].function is not function:
        raise ValueError(f"name must be new, got {name!r}, which is registered.")
    SCORES[name] = Score(function, needs_span)


def chosen_scores(extra_weights: Mapping[str, float]) -> dict[str, Score]:
    """The scores of a run: the three of every run, then those that `extra_weights` names.

    Raises:
        InputError: a name is not registered, or is one of the three.
    """
    extra = sorted(set(SCORES) - set(BASE_SCORES))
    for name in extra_weights:
        if name not in extra:
            known = ", ".join(extra) or "none so far; register_score adds one"
            raise InputError(f"extra_weights must name registered extra scores ({known}), got {name!r}{did_you_mean(name, extra)}")
    return {name: SCORES[name] for name in (*BASE_SCORES, *extra_weights)}


def gram_matrices(layer: AttentionLayer) -> Tensor:
    """W_hᵀ W_h of each head's slice W_h (F, D) of the output projection: (H, D, D) float64, on its device.

    ‖W_h x‖² = xᵀ (W_hᵀ W_h) x, so norms after the projection need no (B, T, H, F) tensor.
    """
    module: Any = layer.output.module
    slices = [layer.output.head(module.weight.detach(), head).double() for head in range(layer.num_heads)]
    return torch.stack([part.T @ part for part in slices])
