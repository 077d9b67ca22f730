"""`.mscan` files: activation and gradient norms of every block of every weight, per token. docs/mscan.md describes the bytes."""

from ..errors import MscanError
from . import ranks, v2  # noqa: F401  # with v1.reader, registers the readers of MscanReader
from .compat import append_records_to_mscan, create_mscan_file, load_mscan_file
from .layout import LayoutEntry, layout_groups
from .reader import MscanReader, PlaneCodes
from .stats import ModuleStats, PlaneStats
from .types import Integral, SequenceRecord
from .writer import MscanWriter

__all__ = [
    "Integral",
    "LayoutEntry",
    "ModuleStats",
    "MscanError",
    "MscanReader",
    "MscanWriter",
    "PlaneCodes",
    "PlaneStats",
    "SequenceRecord",
    "append_records_to_mscan",
    "create_mscan_file",
    "layout_groups",
    "load_mscan_file",
]
