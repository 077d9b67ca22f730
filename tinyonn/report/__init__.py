"""Figures and HTML pages of a scan."""

from .compare import ComparisonResult, SpecificBlock, write_comparison
from .report import ReportResult, write_report

__all__ = ["ComparisonResult", "ReportResult", "SpecificBlock", "write_comparison", "write_report"]
