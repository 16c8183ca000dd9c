"""The report of a round: one static HTML page, from the lake's views to pictures and numbers."""

from flows.report.build import build_report

__all__ = ["build_report"]
