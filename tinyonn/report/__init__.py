"""Figures and HTML pages of a scan."""
