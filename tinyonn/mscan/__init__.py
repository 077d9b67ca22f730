"""`.mscan` files: what every block of every weight did for every token. docs/mscan.md describes the bytes."""

from tinyonn.mscan.compat import append_records_to_mscan, create_mscan_file, load_mscan_file
from tinyonn.mscan.layout import LayoutEntry, layout_groups
from tinyonn.mscan.reader import MscanReader, PlaneCodes
from tinyonn.mscan.stats import ModuleStats, PlaneStats
from tinyonn.mscan.types import Integral, SequenceRecord
from tinyonn.mscan.writer import MscanWriter

__all__ = [
    "Integral",
    "LayoutEntry",
    "ModuleStats",
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
