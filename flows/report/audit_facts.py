"""The audit on the page: what canaries and judge say of the filter, and what another threshold would do."""

from collections import defaultdict
from dataclasses import dataclass

import duckdb
import numpy as np

from blip_core.filter_figures import Bin, calibration, roc
from flows.audit.show import Figure, audit_figures
from flows.audit.sweep import SweepPoint, sweep

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))
"""0 keeps every scored text."""
MAX_POINTS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class RocCurve:
    """True pairs kept against mismatches of one kind kept."""

    kind: str
    points: tuple[tuple[float, float], ...]
    """(mismatches kept, true pairs kept)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFacts:
    """The audit of a round; empty where it was not audited."""

    figures: tuple[Figure, ...]
    curves: tuple[RocCurve, ...]
    bins: tuple[Bin, ...]
    """Calibration of itm_prob; empty for a scorer without it."""
    sweep: tuple[SweepPoint, ...]
    """Of itm_prob; empty for a scorer without it."""


def gather_audit(connection: duckdb.DuckDBPyConnection, round: int) -> AuditFacts:
    """Everything that the page says of the audit of a round. Reads `canaries`, `metrics` and `verdicts`."""
    rows = connection.execute(
        "SELECT kind, truth, itm_prob FROM canaries WHERE round = ? AND itm_prob IS NOT NULL AND truth IS NOT NULL "
        "ORDER BY caption_id, kind",
        [round],
    ).fetchall()
    return AuditFacts(
        figures=tuple(audit_figures(connection, round)),
        curves=_curves(rows),
        bins=tuple(
            calibration(np.array([row[2] for row in rows]), np.array([row[1] for row in rows]))
            if rows
            else ()
        ),
        sweep=tuple(sweep(connection, round, THRESHOLDS)),
    )


def _curves(rows: list[tuple[str, bool, float]]) -> tuple[RocCurve, ...]:
    scores: dict[str, list[float]] = defaultdict(list)
    for kind, _, itm_prob in rows:
        scores[kind].append(itm_prob)
    true = np.array(scores.pop("true", []))
    if not len(true):
        return ()
    return tuple(
        RocCurve(kind=kind, points=_points(true, np.array(wrong)))
        for kind, wrong in sorted(scores.items())
    )


def _points(true: np.ndarray, wrong: np.ndarray) -> tuple[tuple[float, float], ...]:
    _, kept_true, kept_wrong = roc(true, wrong)
    step = max(1, len(kept_true) // MAX_POINTS)
    places = [*range(0, len(kept_true), step), len(kept_true) - 1]
    return (
        (0.0, 0.0),
        *((float(kept_wrong[place]), float(kept_true[place])) for place in dict.fromkeys(places)),
    )
