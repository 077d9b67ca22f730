"""Which steps of a store stay restorable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from ..errors import InputError


@dataclass(frozen=True)
class Keep:
    """The steps to keep: those that one of the rules names. The newest step is always kept.

    Args:
        last: the last n steps; None for all.
        every: steps that are multiples of n; None for none.
        best: the n steps with the highest score, which is PI in `OnnTrainer`.

    Raises:
        InputError: a number is out of range.
    """

    last: int | None = 1
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("last", self.last, 1), ("every", self.every, 1), ("best", self.best, 0)):
            if value is None and name != "best":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"keep's {name} must be a whole number of at least {least}, got {value!r}.")

    @classmethod
    def parse(cls, text: str | Keep) -> Self | Keep:
        """From a text such as "last:3,every:1000,best:1", or "all".

        Raises:
            InputError: the text is something else.
        """
        if isinstance(text, Keep):
            return text
        if not isinstance(text, str):
            raise InputError(f"keep must be a text such as 'last:3,every:1000,best:1' or 'all', got {text!r}.")
        if text.strip() == "all":
            return cls(last=None)
        values: dict[str, int] = {}
        for part in text.split(","):
            name, colon, number = part.strip().partition(":")
            if not colon or name not in ("last", "every", "best") or not number.isdecimal() or name in values:
                raise InputError(f"keep must be a text such as 'last:3,every:1000,best:1' or 'all', got {text!r}.")
            values[name] = int(number)
        return cls(**values)

    def __str__(self) -> str:
        if self.last is None:
            return "all"
        every = f",every:{self.every}" if self.every else ""
        return f"last:{self.last}{every}" + (f",best:{self.best}" if self.best else "")

    def chosen(self, steps: list[int], scores: dict[int, float]) -> list[int]:
        """The steps to keep of these, which are in order."""
        if self.last is None:
            return steps
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept.update(step for step in steps if step % self.every == 0)
        if self.best:
            kept.update(self.best_of(scores))
        return [step for step in steps if step in kept]

    def best_of(self, scores: dict[int, float]) -> list[int]:
        """The steps with the highest scores, of equal ones the later."""
        known = [step for step, score in scores.items() if math.isfinite(score)]
        return sorted(known, key=lambda step: (-scores[step], -step))[: self.best]


def to_ranges(steps: list[int], before: Iterable[list[int]] = ()) -> list[list[int]]:
    """Steps in order as [first, last, stride], few where they are regular; after those of the steps before."""
    found = [list(one) for one in before]
    for step in steps:
        if found:
            first, last, stride = found[-1]
            if first == last:
                found[-1] = [first, step, step - first]
                continue
            if step - last == stride:
                found[-1][1] = step
                continue
        found.append([step, step, 1])
    return found


def from_ranges(ranges: Iterable[list[int]]) -> list[int]:
    return [step for first, last, stride in ranges for step in range(first, last + 1, stride)]
