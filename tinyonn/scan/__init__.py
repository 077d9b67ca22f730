"""Digital fMRI: corpus, engine, runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .config import ScanConfig as ScanConfig
    from .corpus.corpus import Corpus as Corpus
    from .corpus.corpus import read_corpus as read_corpus
    from .corpus.records import CorpusItem as CorpusItem
    from .engine.engine import ScanEngine as ScanEngine
    from .engine.engine import SequenceScan as SequenceScan
    from .estimate import ScanEstimate as ScanEstimate
    from .estimate import estimate_scan as estimate_scan
    from .output import OutputCompleteError as OutputCompleteError
    from .output import OutputDiffersError as OutputDiffersError
    from .runner import ScanInterrupted as ScanInterrupted
    from .runner import ScanProgress as ScanProgress
    from .runner import ScanResult as ScanResult
    from .runner import run_scan as run_scan

# Loaded on first use, so that a corpus can be read and options checked without torch.
_HOMES = {
    "Corpus": "corpus.corpus",
    "CorpusItem": "corpus.records",
    "OutputCompleteError": "output",
    "OutputDiffersError": "output",
    "ScanConfig": "config",
    "ScanEngine": "engine.engine",
    "ScanEstimate": "estimate",
    "ScanInterrupted": "runner",
    "ScanProgress": "runner",
    "ScanResult": "runner",
    "SequenceScan": "engine.engine",
    "estimate_scan": "estimate",
    "read_corpus": "corpus.corpus",
    "run_scan": "runner",
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
