"""Figures and HTML pages of a scan."""

from tinyonn.report.report import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
