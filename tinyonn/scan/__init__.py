"""Digital fMRI: corpus, engine, runner."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ScanConfig as ScanConfig
    from .corpus import Corpus as Corpus
    from .corpus import read_corpus as read_corpus
    from .engine import ScanEngine as ScanEngine
    from .engine import SequenceScan as SequenceScan
    from .estimate import ScanEstimate as ScanEstimate
    from .estimate import estimate_scan as estimate_scan
    from .output import OutputCompleteError as OutputCompleteError
    from .output import OutputDiffersError as OutputDiffersError
    from .records import CorpusItem as CorpusItem
    from .runner import ScanInterrupted as ScanInterrupted
    from .runner import ScanProgress as ScanProgress
    from .runner import ScanResult as ScanResult
    from .runner import run_scan as run_scan

# Loaded when asked for: a corpus can be read, and options checked, without torch.
_HOMES = {
    "Corpus": "corpus",
    "CorpusItem": "records",
    "OutputCompleteError": "output",
    "OutputDiffersError": "output",
    "ScanConfig": "config",
    "ScanEngine": "engine",
    "ScanEstimate": "estimate",
    "ScanInterrupted": "runner",
    "ScanProgress": "runner",
    "ScanResult": "runner",
    "SequenceScan": "engine",
    "estimate_scan": "estimate",
    "read_corpus": "corpus",
    "run_scan": "runner",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
