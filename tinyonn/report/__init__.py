"""Figures and HTML pages of a scan."""

from tinyonn.report.compare import ComparisonResult, SpecificBlock, write_comparison
from tinyonn.report.report import ReportResult, write_report

__all__ = ["ComparisonResult", "ReportResult", "SpecificBlock", "write_comparison", "write_report"]
