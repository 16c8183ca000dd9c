"""What a run came to, and whether there was anything to do at all."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flows import models
from flows.session import Run
from flows.steps.shards import web_parts
from storage import drop_part, layout, list_parts, rounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """How a run of the cycle ended."""

    lake: str
    round: int
    status: str
    """promoted, refused, or `nothing new` when there was no reason to run the round."""
    why: str
    champion_id: str | None


def outcome(run: Run) -> RoundOutcome:
    """The recorded result of the run's round."""
    record = rounds.read_round(run.lake, run.round)
    assert record is not None, f"round {run.round} was never begun"
    return RoundOutcome(
        lake=run.lake.uri,
        round=run.round,
        status=record.status,
        why=record.why or "",
        champion_id=record.champion_after,
    )


def nothing_new(run: Run) -> RoundOutcome | None:
    """The outcome of a later round that would only repeat the one before, else None.

    It would when champion, settings and web pairs are all the same. Its empty record is dropped, so
    that the number is free for the round that has something to do.
    """
    before = rounds.read_round(run.lake, run.round - 1) if run.round > 1 else None
    record = rounds.read_round(run.lake, run.round)
    if before is None or record is None or record.status != "running":
        return None
    started_from = models.starting_model_of(run.lake, before)
    same_champion = record.champion_before == started_from.model_id
    scored = {part.name for part in list_parts(run.lake, "scores", before.round)}
    new_web = [part for part in web_parts(run) if part.name not in scored]
    if not same_champion or new_web or record.settings != before.settings:
        return None
    why = (
        f"nothing new since round {before.round}: it left the same champion "
        f"({(record.champion_before or '')[:8]}), there are no new web pairs and the settings are "
        "the same; add URLs, or change a setting, to make another round worth running"
    )
    _forget_round(run)
    logger.info("round %d not run: %s", run.round, why)
    return RoundOutcome(
        lake=run.lake.uri,
        round=run.round,
        status="nothing new",
        why=why,
        champion_id=record.champion_before,
    )


def _forget_round(run: Run) -> None:
    """Remove the record of a round that made nothing."""
    for part in list_parts(run.lake, "rounds", run.round):
        drop_part(run.lake, part)
    run.lake.root.remove(layout.round_dir(run.round))
