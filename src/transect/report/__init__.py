"""Rows to one self-contained HTML page with figures; reads rows only."""

from transect.report.page import write_report

__all__ = ["write_report"]
