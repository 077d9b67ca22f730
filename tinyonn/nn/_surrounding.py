"""Values that a context sets for the calls of mixtures in one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Surrounding(threading.local):
    """A value for the calls of one mixture in this thread, or None. A copy of a mixture starts with None."""

    def __init__(self) -> None:
        self.value: Any = None

    def __reduce__(self) -> tuple[type[Surrounding], tuple[()]]:
        return Surrounding, ()


def places_of(model: nn.Module, name: str) -> list[Surrounding]:
    """The attributes of this name of the model's mixtures."""
    places = [getattr(module, name, None) for module in model.modules()]
    return [place for place in places if isinstance(place, Surrounding)]


@contextmanager
def held(values: Iterable[tuple[Surrounding, Any]]) -> Iterator[None]:
    """Sets each value within the block and restores the previous ones after it."""
    values = list(values)
    before = [place.value for place, _ in values]
    for place, value in values:
        place.value = value
    try:
        yield
    finally:
        for (place, _), value in zip(values, before, strict=True):
            place.value = value
