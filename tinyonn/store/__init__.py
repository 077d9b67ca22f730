"""Perpetual training: a store of incremental checkpoints, and the log of a life."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .compaction import Compaction as Compaction
    from .errors import DamagedStoreError as DamagedStoreError
    from .errors import StoreError as StoreError
    from .forking import fork as fork
    from .keep import Keep as Keep
    from .life_log import LifeLog as LifeLog
    from .life_log import LifeLogError as LifeLogError
    from .life_log import LifeRecords as LifeRecords
    from .life_log import LogEnd as LogEnd
    from .life_log import environment as environment
    from .life_log import read_life_log as read_life_log
    from .perpetual_store import PerpetualStore as PerpetualStore
    from .perpetual_store import Save as Save
    from .rewinding import rewind as rewind
    from .verification import Verification as Verification
    from .verification import verify as verify

# Loaded on first access, so that a log can be read without torch.
_HOMES = {
    "Compaction": "compaction",
    "DamagedStoreError": "errors",
    "Keep": "keep",
    "LifeLog": "life_log",
    "LifeLogError": "life_log",
    "LifeRecords": "life_log",
    "LogEnd": "life_log",
    "PerpetualStore": "perpetual_store",
    "Save": "perpetual_store",
    "StoreError": "errors",
    "Verification": "verification",
    "environment": "life_log",
    "fork": "forking",
    "read_life_log": "life_log",
    "rewind": "rewinding",
    "verify": "verification",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _HOMES)
