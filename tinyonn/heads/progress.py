"""Progress of a long step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a step at one moment.

    Attributes:
        stage: name of the stage: "loading", "scoring", "training".
        fraction: fraction of the stage that is done; None if unknown.
        text: a few words: "128/1,024 samples".
    """

    stage: str
    fraction: float | None
    text: str
