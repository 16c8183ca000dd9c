"""What the template needs to draw the audit."""

import json
from typing import Any

from markupsafe import Markup

from flows.audit.show import LABELS
from flows.audit.sweep import SweepPoint
from flows.report import charts
from flows.report.audit_charts import UNIT, calibration_chart, roc_chart, sweep_chart
from flows.report.audit_facts import AuditFacts
from flows.report.panel import Panel

START = 0.5
"""Where the slider stands at first."""


def audit_parts(audit: AuditFacts, numbers: charts.Numbering) -> dict[str, Any]:
    """Panels, and the sweep as table, chart and the slider's data."""
    sources = sorted({point.source for point in audit.sweep}, reverse=True)
    by_source = {
        source: [point for point in audit.sweep if point.source == source] for source in sources
    }
    thresholds = [point.threshold for point in by_source[sources[0]]] if sources else []
    data = {
        "thresholds": thresholds,
        "points": {source: [_plain(point) for point in of] for source, of in by_source.items()},
        "left": UNIT.x(0),
        "right": UNIT.x(1),
    }
    return {
        "audit_labels": LABELS,
        "audit_panels": _panels(audit, numbers),
        "sweep_sources": sources,
        "sweep_thresholds": thresholds,
        "sweep_start": thresholds.index(START) if START in thresholds else 0,
        "sweep_svg": sweep_chart(numbers, audit.sweep) if sources else "",
        # numbers and the names of sources only; `<` could not occur, and is kept out all the same
        "sweep_json": Markup(json.dumps(data).replace("<", "\\u003c")),
    }


def _panels(audit: AuditFacts, numbers: charts.Numbering) -> list[Panel]:
    panels = []
    if audit.curves:
        panels.append(
            Panel(
                title="True pairs against mismatches",
                note="A line for each kind of mismatch. The further up and left, the better.",
                svg=roc_chart(numbers, audit.curves),
            )
        )
    if audit.bins:
        panels.append(
            Panel(
                title="Does itm_prob mean what it says?",
                note="Canaries of each range that are true, with 95 % intervals; three mismatches to a true pair.",
                svg=calibration_chart(numbers, audit.bins),
            )
        )
    return panels


def _plain(point: SweepPoint) -> dict[str, Any]:
    noise = point.noise
    return {
        "texts": point.texts,
        "kept": point.kept,
        "noise": None
        if noise is None
        else [round(value, 4) for value in (noise.value, noise.low, noise.high)],
    }
