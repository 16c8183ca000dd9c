"""The audit of a round as it is printed, and, where the truth is known, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from flows.steps.audit import CANARIES, JUDGE

LABELS = {
    "noise_before_web": "wrong web texts, before filtering",
    "noise_left_web": "wrong web texts, among the kept",
    "noise_before_synthetic": "wrong synthetic captions, before filtering",
    "noise_left_synthetic": "wrong synthetic captions, among the kept",
    "noise_before": "wrong texts, before filtering",
    "noise_left": "wrong texts, among the kept",
    "threshold": "threshold of the policy",
    "filter_recall": "true pairs kept (recall)",
    "filter_false_keep_random": "random mismatches kept",
    "filter_false_keep_hard": "hard mismatches kept",
    "filter_false_keep_swapped": "one-word swaps kept",
    "filter_precision": "precision at even odds",
    "filter_auc": "AUC, all mismatches",
    "threshold_for_precision_web": "threshold for the precision asked for, web",
    "written_contradicted": "captions for canaries that people contradict",
    "written_contradicted_kept": "the same, of those the filter keeps",
    "people_contradicted": "human captions that the others contradict",
    "judge_agreement": "judge and policy agree",
    "judge_web": "judge's number, web texts",
    "judge_kept_web": "judge's number, kept web texts",
    "judge_synthetic": "judge's number, synthetic captions",
    "judge_kept_synthetic": "judge's number, kept synthetic captions",
    "judge_gap": "filter's itm_prob minus the judge's, kept texts",
}
"""What is shown, in order; the table `metrics` has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number."""

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int


def audit_figures(con: Any, round: int) -> list[Figure]:
    """What the audit of a round measured, in the order of LABELS; nothing when it was not audited."""
    rows = con.execute(
        "SELECT metric, value, low, high, n FROM metrics WHERE round = ? AND dataset IN (?, ?)",
        [round, CANARIES, JUDGE],
    ).fetchall()
    found = {
        row[0]: Figure(metric=row[0], value=row[1], low=row[2], high=row[3], n=row[4])
        for row in rows
    }
    return [found[metric] for metric in LABELS if metric in found]


def audit_table(
    figures: list[Figure],
    truth: Mapping[str, float] | None = None,
    title: str = "The filter audited",
) -> Table:
    """Figures with their 95 % intervals; `truth` holds what is known of some of them."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    headings = ["estimate", "95 % interval", "n", *(["truth"] if truth else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for figure in figures:
        interval = "" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}"
        cells = [LABELS[figure.metric], f"{figure.value:.3f}", interval, f"{figure.n:,}"]
        if truth:
            known = truth.get(figure.metric)
            cells.append("" if known is None else f"{known:.3f}")
        table.add_row(*cells)
    return table
