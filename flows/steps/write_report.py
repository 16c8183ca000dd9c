"""The report: one static page of a round."""

from __future__ import annotations

from flows.report import build_report
from flows.session import Run


def write_report(run: Run) -> str:
    """Write the round's page; returns its path in the lake."""
    return build_report(run.lake, run.round, gallery_pairs=run.settings.report.gallery_pairs)
