"""What the template needs to draw a comparison of policies."""

from typing import Any

from markupsafe import Markup

from flows.comparison.figure import panel_svg
from flows.comparison.table import Comparison
from flows.comparison.words import IN_TABLES, notes, sentences


def pay_parts(comparison: Comparison | None) -> dict[str, Any]:
    """Panels, sentences and notes; empty where nothing was compared."""
    if comparison is None:
        return {"pay_panels": [], "pay_sentences": [], "pay_notes": []}
    shown = [metric for metric in IN_TABLES if metric in comparison.metrics]
    return {
        # every text in it is escaped where it is made
        "pay_panels": [Markup(panel_svg(comparison, metric)) for metric in shown],
        "pay_sentences": sentences(comparison),
        "pay_notes": notes(comparison),
    }
