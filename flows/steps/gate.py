"""The gate: may the challenger become the next round's starting point?

Every rule of the settings is held against what was measured and leaves a row in `gate_rules`. One that refuses
decides; else one that asks a person; else the challenger is promoted. The champion stays unless it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import duckdb

from blip_core import Metric, mean_recall_gain
from flows.errors import MissingInput
from flows.gate_section import HEADLINE, GateRule
from flows.session import Run
from flows.steps import collapse
from flows.steps.batches import rows_table
from flows.steps.heldout import DATASET as HELDOUT
from flows.steps.heldout import ranks_of
from flows.steps.rules import Figure, Finding, Outcome, hold
from storage import ModelRef, basis_of, commit_part, connect, list_parts, registry, rounds

STAGE_VERSION = 1
PART = "gate"

FIGURE_SQL = """
SELECT value, low, high, model_id FROM metrics
WHERE round = $round AND dataset = $dataset AND metric = $metric AND value IS NOT NULL
  AND ($model_id IS NULL OR model_id = $model_id)
ORDER BY model_id LIMIT 1
"""
# Whose the figures of a round's captions, canaries and judged texts are.
MODEL_SQL = {
    "captions": "SELECT model_id FROM captions WHERE round = ? AND source = 'synthetic' LIMIT 1",
    "canaries": "SELECT model_id FROM scores WHERE round = ? LIMIT 1",
    "judge": "SELECT model_id FROM scores WHERE round = ? LIMIT 1",
}
JUDGE_SQL = "SELECT model_id FROM judgements WHERE round = ? LIMIT 1"
OF_TWO = ("judge_agreement", "judge_kept_itm_prob", "judge_gap")
"""Figures that compare the judge with the filter; in round 1 the default judge is that very filter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the gate says, with the findings that it rests on."""

    status: Literal["promoted", "refused", "needs a person"]
    why: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        """What a person wants to read of it."""
        return f"{self.status}: {self.why}"

    @property
    def promoted(self) -> bool:
        """Whether the challenger becomes the champion."""
        return self.status == "promoted"


def judge(run: Run, champion: ModelRef, challenger: ModelRef) -> Verdict:
    """Hold every rule of the settings against the round.

    Raises:
        MissingInput: one of the two models has not been evaluated.
    """
    with connect(run.lake) as connection:
        asked = _Asked(run, connection, champion, challenger)
        findings = tuple(
            hold(
                name,
                rule,
                asked.figure(rule),
                asked.reference(rule),
                asked.paired if rule.is_headline and rule.against == "champion" else lambda: None,
            )
            for name, rule in run.settings.gate.table.items()
        )
        headline = asked.headline()
    return _verdict(headline, findings, _changed_by_hand(run, challenger))


def write_findings(run: Run, verdict: Verdict) -> None:
    """One row of `gate_rules` for every rule, in place of those of an earlier verdict on the round."""
    rules = {f.name: f.rule.model_dump(mode="json") for f in verdict.findings}
    inputs = sorted(part.fingerprint for part in list_parts(run.lake, "metrics", run.round))
    basis = basis_of("gate", STAGE_VERSION, rules, inputs)
    rows = rows_table("gate_rules", [finding.row(run.round) for finding in verdict.findings])
    commit_part(run.lake, "gate_rules", PART, rows, round=run.round, basis=basis)


def _verdict(headline: str, findings: tuple[Finding, ...], by_hand: str | None) -> Verdict:
    refusing = [f for f in findings if f.refuses]
    asking = [f for f in findings if f.asks_person]
    status: Literal["promoted", "refused", "needs a person"] = "promoted"
    if refusing:
        status = "refused"
    elif asking or by_hand:
        status = "needs a person"
    told = refusing or asking
    reasons = [f"{f.name}: {f.why}" for f in told]
    if refusing and asking:
        reasons.append(f"a person would be asked for {', '.join(f.name for f in asking)}")
    if by_hand:
        reasons.append(by_hand)
    if not any(f.rule.is_headline for f in told):
        reasons.append(headline)
    counts = [sum(f.outcome == name for f in findings) for name in get_args(Outcome)]
    reasons.append(
        "of {} rules {} passed, {} failed, {} were not measured".format(len(findings), *counts)
    )
    return Verdict(status=status, why="; ".join(reasons), findings=findings)


def _changed_by_hand(run: Run, challenger: ModelRef) -> str | None:
    """Why a round cannot promote by itself: somebody has chosen another champion since it began."""
    now, record = registry.champion(run.lake), rounds.read_round(run.lake, run.round)
    if now is None or record is None or record.champion_before in (None, now.model_id):
        return None
    if now.model_id == challenger.model_id:  # Killed after the promotion, before the record.
        return None
    return (
        f"the champion was changed to {now.model_id[:8]} after this round had begun with "
        f"{record.champion_before[:8]}, which it was compared with"
    )


class _Asked:
    """The figures of a round and of what it is compared with, as rules ask for them."""

    def __init__(
        self,
        run: Run,
        connection: duckdb.DuckDBPyConnection,
        champion: ModelRef,
        challenger: ModelRef,
    ) -> None:
        self.run, self.connection = run, connection
        self.champion, self.challenger = champion, challenger
        self.paired = functools.cache(self._paired)
        self.before = [
            record.round
            for record in rounds.list_rounds(run.lake)
            if record.round < run.round and record.status == "promoted"
        ]

    def figure(self, rule: GateRule) -> Figure | None:
        """The figure that a rule is about, of this round."""
        model_id = self.challenger.model_id if rule.dataset == HELDOUT else None
        return self._read(rule, self.run.round, model_id, "")

    def reference(self, rule: GateRule) -> Figure | None:
        """What it is compared with."""
        if rule.against == "nothing":
            return None
        if rule.against == "champion":
            model_id = self.champion.model_id
            return self._read(rule, self.run.round, model_id, f"champion {model_id[:8]}")
        if rule.against == "best":
            found = [figure for number in self.before if (figure := self._earlier(rule, number))]
            return max(found, key=lambda figure: figure.value, default=None)
        numbers = self.before if rule.against == "first" else reversed(self.before)
        for number in numbers:
            if (figure := self._earlier(rule, number)) is not None:
                return figure
        if rule.against == "first" and rule.dataset == collapse.DATASET:
            return self._of_people(rule)
        return None

    def headline(self) -> str:
        """Both models' mean recall in a sentence. Raises MissingInput when one has none."""
        for ref in (self.champion, self.challenger):
            if self._row(self.run.round, HELDOUT, HEADLINE, ref.model_id) is None:
                raise MissingInput(
                    f"model {ref.model_id} has no {HEADLINE} on the held-out pairs; "
                    "run `bootstrap evaluate` first"
                )
        after, before = (
            self._row(self.run.round, HELDOUT, HEADLINE, ref.model_id)[0]  # type: ignore[index]
            for ref in (self.challenger, self.champion)
        )
        gain = self.paired()
        between = f" (95 % interval {gain.low:+.4f} to {gain.high:+.4f})" if gain else ""
        return (
            f"{HEADLINE} {after:.4f} of challenger {self.challenger.model_id[:8]} is "
            f"{after - before:+.4f}{between} from the {before:.4f} of champion "
            f"{self.champion.model_id[:8]}"
        )

    def _paired(self) -> Metric | None:
        """The paired difference of mean recall; None when ranks were not kept, as in older lakes."""
        before, after = (ranks_of(self.run, ref) for ref in (self.champion, self.challenger))
        if before is None or after is None or before[1] != after[1]:
            return None
        return mean_recall_gain(before[0], after[0])

    def _earlier(self, rule: GateRule, round: int) -> Figure | None:
        """The figure of a promoted round, as it was measured then."""
        model = registry.find(self.run.lake, "med", round)
        model_id = model.model_id if model and rule.dataset == HELDOUT else None
        return self._read(rule, round, model_id, f"round {round}")

    def _judges_itself(self, round: int) -> bool:
        """Whether the judge was the round's own filter: the two then agree, which says nothing."""
        judges, filters = (
            self.connection.execute(sql, [round]).fetchone()
            for sql in (JUDGE_SQL, MODEL_SQL["judge"])
        )
        return judges is not None and judges == filters

    def _of_people(self, rule: GateRule) -> Figure | None:
        """In a lake without a promoted round: the same figure of human captions."""
        first = collapse.first_captioned(self.connection)
        row = self._row(first, collapse.PEOPLE, rule.metric, None) if first else None
        return _figure(row, "people") if row else None

    def _read(self, rule: GateRule, round: int, model_id: str | None, of: str) -> Figure | None:
        if rule.dataset == "judge" and rule.metric in OF_TWO and self._judges_itself(round):
            return None
        if model_id is None and rule.dataset in MODEL_SQL:
            found = self.connection.execute(MODEL_SQL[rule.dataset], [round]).fetchone()
            model_id = found[0] if found else None
        row = self._row(round, rule.dataset, rule.metric, model_id)
        return _figure(row, of or f"{_ROLES[rule.dataset]} {row[3][:8]}") if row else None

    def _row(
        self, round: int, dataset: str, metric: str, model_id: str | None
    ) -> tuple[float, float | None, float | None, str] | None:
        about = {"round": round, "dataset": dataset, "metric": metric, "model_id": model_id}
        row: tuple[float, float | None, float | None, str] | None
        row = self.connection.execute(FIGURE_SQL, about).fetchone()
        return row


_ROLES = {
    "heldout": "challenger",
    "captions": "captioner",
    "canaries": "filter",
    "judge": "filter",
}


def _figure(row: tuple[float, float | None, float | None, str], of: str) -> Figure:
    value, low, high, model_id = row
    return Figure(value=value, low=low, high=high, model_id=model_id, of=of)
