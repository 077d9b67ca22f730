"""A model that lives: it starts random, trains on text, and its experts are born and recycled (`tinyonn train`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .config import LifeConfig as LifeConfig
    from .forking import fork_life as fork_life
    from .running import TrainingResult as TrainingResult
    from .training import LifeResult as LifeResult
    from .training import train as train

# Loaded on first access, so that options can be checked without torch.
_HOMES = {
    "LifeConfig": "config",
    "fork_life": "forking",
    "TrainingResult": "running",
    "LifeResult": "training",
    "train": "training",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
