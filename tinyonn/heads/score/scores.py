"""Scores of attention heads: a registry of functions that map an observation of a layer to one value per sample and head.

Higher scores mean more. A user-defined score is one function and one call. It then has columns in the files, and a weight in the fusion
if `extra_weights` names it:

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
    """Observation of one layer for one batch. B samples, Tq queries (1 if only the last token is scored), H heads, D head dim.

    Attributes:
        layer: layer of the heads.
        outputs: (B, Tq, H, D) in the model's dtype: each head's slice of the input of the output projection.
        entropy: (B, Tq, H), entropy of the attention in nats.
        span_mass: (B, Tq, H), share of the attention on tokens of the question; 0 in samples whose question was lost.
        counted: (B, Tq) bool, False for padding.
        gram: (H, D, D) float64, W_hᵀ W_h of each head's slice W_h (F, D) of the output projection, if output norms are measured after
            it; else None.
    """

    layer: AttentionLayer
    outputs: Tensor
    entropy: Tensor
    span_mass: Tensor
    counted: Tensor
    gram: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of a sample without padding, in float64: (B, Tq, H) → (B, H)."""
        counted = self.counted[..., None]
        return torch.where(counted, values.double(), 0.0).sum(1) / counted.sum(1)


class Score(NamedTuple):
    """A registered score.

    Attributes:
        function: function of an Observation that returns (B, H).
        needs_span: whether samples whose question was lost have no score.
    """

    function: Callable[[Observation], Tensor]
    needs_span: bool


def output_norm(seen: Observation) -> Tensor:
    """`out`: L2 norm of a head's output; with `gram`, L2 norm after the head's slice of the output projection without bias, ‖W_h x‖."""
    x = seen.outputs.double()
    if seen.gram is None:
        return seen.mean(x.norm(dim=-1))
    squared = (torch.einsum("bthd,hde->bthe", x, seen.gram) * x).sum(-1)
    return seen.mean(squared.clamp_min(0).sqrt())


def concentration(seen: Observation) -> Tensor:
    """`ent`: negative entropy of a head's attention in nats; 0 if all of it is on one token.

    Source: entropy of heads as in Clark et al., "What does BERT look at?", arXiv:1906.04341.
    """
    return seen.mean(-seen.entropy)


def question_mass(seen: Observation) -> Tensor:
    """`task`: share of a head's attention on the question, 0 … 1."""
    return seen.mean(seen.span_mass)


SCORES: dict[str, Score] = {
    "out": Score(output_norm, False),
    "ent": Score(concentration, False),
    "task": Score(question_mass, True),
}
BASE_SCORES = tuple(SCORES)


def register_score(name: str, function: Callable[[Observation], Tensor], *, needs_span: bool = False) -> None:
    """Registers a score.

    Args:
        name: name of lower-case letters, digits and `_`, with which its columns begin.
        function: function of an Observation that returns (B, H), such as `Observation.mean`; higher means more.
        needs_span: whether the score uses `span_mass`; its mean then excludes samples whose question was lost.

    Raises:
        ValueError: the name is registered already, or has other characters.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and '_', got {name!r}.")
    if name in SCORES and SCORES[name].function is not function:
        raise ValueError(f"name must be new, got {name!r}, which is registered.")
    SCORES[name] = Score(function, needs_span)


def chosen_scores(extra_weights: Mapping[str, float]) -> dict[str, Score]:
    """Scores of a run: the three built-in ones, then those in `extra_weights`.

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

    ‖W_h x‖² = xᵀ (W_hᵀ W_h) x, so that norms after the projection need no (B, T, H, F) tensor.
    """
    module: Any = layer.output.module
    slices = [layer.output.head(module.weight.detach(), head).double() for head in range(layer.num_heads)]
    return torch.stack([part.T @ part for part in slices])
