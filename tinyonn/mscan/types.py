"""Record of one scanned sequence, and sums over its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stats import add_moments


@dataclass(slots=True, eq=False)
class Integral:
    """Sums over tokens: ∫SPS and the moments of each block.

    Attributes:
        sps: (blocks,) float64, synergistic prediction score (SPS) summed over tokens; NaN for a block without a counted token.
        count: (blocks,) float64, number of counted tokens.
        activation_mean, activation_m2: (blocks,) float64, mean and sum of squared deviations of the activation norm.
        grad_mean, grad_m2: (blocks,) float64, the same for the gradient norm.

    `a + b` is the integral over the tokens of both; blocks that one of them lacks count no token there.
    """

    sps: NDArray[np.float64]
    count: NDArray[np.float64]
    activation_mean: NDArray[np.float64]
    activation_m2: NDArray[np.float64]
    grad_mean: NDArray[np.float64]
    grad_m2: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.sps = np.where(np.asarray(self.count) > 0, self.sps, np.nan)

    @classmethod
    def zeros(cls, blocks: int) -> Integral:
        """Integral over no tokens."""
        return cls(*(np.zeros(blocks) for _ in range(6)))

    @classmethod
    def from_planes(cls, sps: NDArray[np.float64], present: NDArray[np.bool_], planes: Sequence[NDArray[Any]]) -> Integral:
        """Integral of one sequence.

        Args:
            sps: (blocks,) SPS summed over tokens.
            present: (tokens, blocks), whether a token counts.
            planes: activation and gradient norms, (tokens, blocks) each.
        """
        count = present.sum(axis=0).astype(np.float64)
        moments = []
        for plane in planes:
            values = np.where(present, plane.astype(np.float64), 0.0)
            mean = values.sum(axis=0) / np.maximum(count, 1)
            moments += [mean, (np.where(present, values - mean, 0.0) ** 2).sum(axis=0)]
        return cls(sps, count, *moments)

    def widened(self, blocks: int) -> Integral:
        """The same integral for a longer layout, whose new blocks count no token."""
        missing = blocks - len(self.sps)
        return self if missing <= 0 else Integral(*(np.pad(plane, (0, missing)) for plane in self.planes()))

    def planes(self) -> tuple[NDArray[np.float64], ...]:
        """The six arrays in file order, with ∫SPS = 0 for a block without a counted token."""
        return (np.where(self.count > 0, self.sps, 0.0), self.count, self.activation_mean, self.activation_m2, self.grad_mean, self.grad_m2)

    def __add__(self, other: Integral) -> Integral:
        if not isinstance(other, Integral):
            return NotImplemented
        blocks = max(len(self.sps), len(other.sps))
        a, b = self.widened(blocks), other.widened(blocks)
        count, *activation = add_moments((a.count, a.activation_mean, a.activation_m2), (b.count, b.activation_mean, b.activation_m2))
        _, *grad = add_moments((a.count, a.grad_mean, a.grad_m2), (b.count, b.grad_mean, b.grad_m2))
        return Integral(a.planes()[0] + b.planes()[0], count, *activation, *grad)


@dataclass(slots=True, eq=False)
class SequenceRecord:
    """One scanned sequence, the argument of `MscanWriter.append`.

    Attributes:
        sequence_id: id of the sequence; a resumed scan skips ids that the file holds.
        token_ids: (tokens,) integers 0 … 2³²−1.
        loss: (tokens,) float32; loss[t] is the loss of predicting token t+1 from t; NaN without a label.
        activation, grad_norm: (tokens, blocks) float32, never negative, NaN = missing; both or neither.
        mask: (tokens,) 1 = marked, such as the tokens of a generated answer; None marks all.
        text: the sequence's text, or None to store none.
        integral: this sequence's integral, committed with it.
    """

    sequence_id: str
    token_ids: Sequence[int] | NDArray[Any]
    loss: Sequence[float] | NDArray[Any]
    activation: NDArray[Any] | None = None
    grad_norm: NDArray[Any] | None = None
    mask: Sequence[int] | NDArray[Any] | None = None
    text: str | None = None
    integral: Integral | None = None
