"""Figures and HTML pages of scans and of measurements on attention heads."""

from .heads.plasticity_aggregate_page import write_plasticity_aggregate
from .heads.plasticity_page import write_plasticity_page
from .heads.scores_page import write_scores_page
from .scan.compare import ComparisonResult, SpecificBlock, write_comparison
from .scan.report import ReportResult, write_report

__all__ = [
    "ComparisonResult",
    "ReportResult",
    "SpecificBlock",
    "write_comparison",
    "write_plasticity_aggregate",
    "write_plasticity_page",
    "write_report",
    "write_scores_page",
]
