"""Weights of the router's loss on surprise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import listed
from ..ops import surprise_min_loss
from ..ops._checks import check_choice, check_number
from ..ops.experts.surprise import Among


@dataclass(frozen=True)
class SurpriseLoss:
    """The router's loss on surprise, `ops.surprise_min_loss`, with its three numbers.

    Where an argument or attribute takes a `SurpriseLoss`, it also takes a mapping of these numbers, such as `{"w_kl": 0.5}`.

    Args:
        w_ce: weight of the cross-entropy with the expert of least surprise, at least 0.
        w_kl: weight of the KL divergence from the softmax of negative surprise, at least 0.
        temperature: temperature of that softmax, above 0; lower is sharper.
        among: "all" or "chosen", see `ops.surprise_min_loss`; None for "chosen" with the surprise kind "saving", else "all".

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range.
    """

    w_ce: float = 1.0
    w_kl: float = 1.0
    temperature: float = 1.0
    among: Among | None = None

    def __post_init__(self) -> None:
        check_number("w_ce", self.w_ce, at_least=0)
        check_number("w_kl", self.w_kl, at_least=0)
        check_number("temperature", self.temperature, above=0)
        if self.among is not None:
            check_choice("among", self.among, get_args(Among))

    def __call__(self, scores: Tensor, surprise: Tensor, token_mask: Tensor | None = None, *, saving: bool = False) -> Tensor:
        """The loss, 0-d; see `ops.surprise_min_loss` for the arguments. With `saving`, surprise is of this kind: the largest is best."""
        among: Among = self.among or ("chosen" if saving else "all")
        if saving:
            surprise = torch.where(surprise == torch.inf, surprise, -surprise)
        return surprise_min_loss(scores, surprise, token_mask=token_mask, **{**asdict(self), "among": among})


def surprise_loss_of(
    surprise_loss: SurpriseLoss | Mapping[str, Any] | None, *, name: str = "surprise_loss", **numbers: Any
) -> SurpriseLoss:
    """The loss given as an object, as a mapping of its fields, or by its numbers; None and no numbers for the defaults.

    Raises:
        TypeError: `surprise_loss`, called `name`, has another type; it and numbers are given.
        ValueError: the mapping has other keys; a number is out of range.
    """
    given = {option: number for option, number in numbers.items() if number is not None}
    if surprise_loss is None:
        return SurpriseLoss(**given)
    if given:
        raise TypeError(f"{name} already contains {', '.join(given)}; give one or the other.")
    if isinstance(surprise_loss, SurpriseLoss):
        return surprise_loss
    if not isinstance(surprise_loss, Mapping):
        got = f"the class {surprise_loss.__name__}" if isinstance(surprise_loss, type) else type(surprise_loss).__name__
        raise TypeError(f"{name} must be a SurpriseLoss or a mapping of its numbers, got {got}.")
    known = [field.name for field in fields(SurpriseLoss)]
    unknown = [repr(key) for key in surprise_loss if key not in known]
    if unknown:
        raise ValueError(f"{name} must have no keys but {', '.join(known)}, got {listed(unknown, 5, width=80)}.")
    return SurpriseLoss(**surprise_loss)
