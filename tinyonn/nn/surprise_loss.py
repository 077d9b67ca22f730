"""Weights of the router's loss on surprise."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from ..ops import surprise_min_loss
from ..ops._checks import check_number


@dataclass(frozen=True)
class SurpriseLoss:
    """The router's loss on surprise, `ops.surprise_min_loss`, with its three numbers.

    Args:
        w_ce: weight of the cross-entropy with the expert of least surprise, at least 0.
        w_kl: weight of the KL divergence from the softmax of negative surprise, at least 0.
        temperature: temperature of that softmax, above 0; lower is sharper.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range.
    """

    w_ce: float = 1.0
    w_kl: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("w_ce", self.w_ce, at_least=0)
        check_number("w_kl", self.w_kl, at_least=0)
        check_number("temperature", self.temperature, above=0)

    def __call__(self, scores: Tensor, surprise: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The loss, 0-d; see `ops.surprise_min_loss` for the arguments."""
        return surprise_min_loss(scores, surprise, token_mask=token_mask, **asdict(self))


def surprise_loss_of(surprise_loss: SurpriseLoss | None, **numbers: float | None) -> SurpriseLoss:
    """The loss given as an object or by its numbers. TypeError if both are given."""
    given = {name: number for name, number in numbers.items() if number is not None}
    if surprise_loss is None:
        return SurpriseLoss(**given)
    if not isinstance(surprise_loss, SurpriseLoss):
        raise TypeError(f"surprise_loss must be a SurpriseLoss, got {type(surprise_loss).__name__}.")
    if given:
        raise TypeError(f"surprise_loss already contains {', '.join(given)}; give one or the other.")
    return surprise_loss
