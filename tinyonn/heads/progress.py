"""What a long step says about where it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One look at a running step.

    Attributes:
        stage: what is going on: "loading", "scoring", "training".
        fraction: share of the stage done; None where it is unknown.
        text: a few words: "128/1,024 samples".
    """

    stage: str
    fraction: float | None
    text: str
