"""The gate: is the challenger good enough to be the next round's starting point?"""

from __future__ import annotations

from dataclasses import dataclass

from flows.errors import MissingInput
from flows.session import Run
from storage import ModelRef, connect

HEADLINE = "mean_recall"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the gate says, with the figures that it rests on."""

    promoted: bool
    why: str
    champion_recall: float
    challenger_recall: float


def judge(run: Run, champion: ModelRef, challenger: ModelRef) -> Verdict:
    """Promote unless the challenger's mean recall on the held-out pairs is lower than allowed.

    Raises:
        MissingInput: one of the two has not been evaluated.
    """
    before, after = (_recall(run, ref) for ref in (champion, challenger))
    allowed = run.settings.gate.max_recall_drop
    promoted = after >= before - allowed
    relation = "is not below" if promoted else "is below"
    why = (
        f"{HEADLINE} {after:.4f} of challenger {challenger.model_id[:8]} {relation} "
        f"{before:.4f} of champion {champion.model_id[:8]} minus the tolerance {allowed:.4f}"
    )
    return Verdict(promoted=promoted, why=why, champion_recall=before, challenger_recall=after)


def _recall(run: Run, ref: ModelRef) -> float:
    with connect(run.lake) as connection:
        row = connection.execute(
            "SELECT value FROM metrics WHERE model_id = ? AND metric = ? AND dataset = 'heldout' "
            "AND round = ?",
            [ref.model_id, HEADLINE, run.round],
        ).fetchone()
    if row is None:
        raise MissingInput(
            f"model {ref.model_id} has no {HEADLINE} on the held-out pairs; "
            "run `bootstrap evaluate` first"
        )
    return float(row[0])
