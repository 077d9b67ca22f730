"""One scan on many machines: each process takes its share of the sequences and writes a file of its own.

Processes do not communicate. Which process scans which sequence follows from the order of the corpus and the number of processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank among `size`, and its rank on this machine, which chooses its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; a single process if they are absent.

        Raises:
            InputError: a variable is not a number, RANK is missing while WORLD_SIZE is above 1, or the rank is out of range.
        """
        env = os.environ if environment is None else environment
        size = _number(env, "WORLD_SIZE", 1)
        rank = _number(env, "RANK", 0)
        if size < 1 or not 0 <= rank < size:
            raise InputError(f"RANK must be below WORLD_SIZE, got {rank} of {size}.")
        if size > 1 and not env.get("RANK"):  # every process would take the first share
            raise InputError(f"RANK must be given where WORLD_SIZE is, got WORLD_SIZE {size} alone.")
        return cls(rank, size, _number(env, "LOCAL_RANK", 0))

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Every size-th item, starting with the rank-th."""
        return itertools.islice(items, self.rank, None, self.size)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    if not value:
        return default
    if not (value.isascii() and value.isdigit()):
        raise InputError(f"{name} must be a whole number, got {value!r}.")
    return int(value)
