"""The round among its neighbours on the page: what the gate asked, collapse, costs, and the rounds side by side."""

from dataclasses import dataclass
from typing import Any

import duckdb

from flows.report.asking import ask

COLLAPSE = (
    ("distinct_share", "Distinct captions"),
    ("distinct_1", "Distinct words"),
    ("distinct_2", "Distinct pairs of words"),
    ("distinct_3", "Distinct triples of words"),
    ("self_bleu", "Self-BLEU"),
    ("length_mean", "Words a caption"),
    ("vocabulary", "Vocabulary"),
    ("mean_logprob", "Mean log-probability"),
    ("matched_share", "Called a match by the filter"),
)
JUDGED = (
    ("judge_agreement", "Judge and policy agree"),
    ("judge_synthetic", "Judge of the captions"),
)

RULES = """
SELECT rule, metric, dataset, "against", value, low, high, "limit", direction, outcome, verdict_if_failed, why
FROM gate_rules WHERE round = $round
ORDER BY CASE outcome WHEN 'fail' THEN 0 WHEN 'pass' THEN 1 ELSE 2 END, rule
"""
WATCHED = """
SELECT round, metric, any_value(value) AS value FROM metrics
WHERE dataset IN ('captions', 'judge') AND round <= $round AND value IS NOT NULL
GROUP BY ALL ORDER BY ALL
"""
ROUNDS = """
SELECT round, status, texts, kept, share_kept, noise_left, filter_recall, best_mean_recall,
    mean_recall_low, mean_recall_high, cider, seconds, seconds_per_kept
FROM compare_rounds WHERE round <= $round ORDER BY round
"""
COSTS = """
SELECT stage, seconds, device_seconds, share FROM round_costs
WHERE round = $round ORDER BY seconds DESC, stage
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one rule of the gate found."""

    rule: str
    metric: str
    dataset: str
    against: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    direction: str
    outcome: str
    verdict_if_failed: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRow:
    """A round beside the others."""

    round: int
    status: str
    texts: int | None
    kept: int | None
    share_kept: float | None
    noise_left: float | None
    filter_recall: float | None
    best_mean_recall: float | None
    mean_recall_low: float | None
    mean_recall_high: float | None
    cider: float | None
    seconds: float | None
    seconds_per_kept: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """One figure of the collapse monitor through the rounds."""

    label: str
    points: tuple[tuple[int, float], ...]
    """(round, value)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a stage cost."""

    stage: str
    seconds: float
    device_seconds: float
    share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """The round among the rounds before it."""

    rules: tuple[Rule, ...]
    rounds: tuple[RoundRow, ...]
    watched: tuple[Watched, ...]
    costs: tuple[Cost, ...]

    @property
    def num_failed(self) -> int:
        """Rules that the round did not meet."""
        return sum(rule.outcome == "fail" for rule in self.rules)


def gather_neighbours(connection: duckdb.DuckDBPyConnection, round: int) -> Neighbours:
    """What the page says of the gate, the rounds and their costs. Reads views, `metrics` and `gate_rules`."""
    about: dict[str, Any] = {"round": round}
    points: dict[str, list[tuple[int, float]]] = {}
    for row in ask(connection, WATCHED, about):
        points.setdefault(row["metric"], []).append((row["round"], row["value"]))
    return Neighbours(
        rules=tuple(Rule(**row) for row in ask(connection, RULES, about)),
        rounds=tuple(RoundRow(**row) for row in ask(connection, ROUNDS, about)),
        watched=tuple(
            Watched(label=label, points=tuple(points[metric]))
            for metric, label in (*COLLAPSE, *JUDGED)
            if metric in points
        ),
        costs=tuple(Cost(**row) for row in ask(connection, COSTS, about)),
    )
