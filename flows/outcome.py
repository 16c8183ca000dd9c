"""What a run came to, and whether there was anything to do at all."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

from flows import models
from flows.session import Run
from flows.steps.shards import web_parts
from storage import (
    PartRef,
    committed_part,
    connect,
    drop_part,
    layout,
    list_parts,
    part_manifest,
    rounds,
)
from storage.fingerprint import explain
from storage.rounds import RoundRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """How a run of the cycle ended."""

    lake: str
    round: int
    status: str
    """promoted, refused, needs a person, or `nothing new` when there was no reason to run the round."""
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
    unscored = (part for part in web_parts(run) if part.name not in scored)
    new_web = any(_brings_something(run, part) for part in unscored)
    if not same_champion or new_web or record.settings != before.settings:
        return None
    why = (
        f"nothing new since round {before.round}: {_ended(before)}, so that the champion is the same "
        f"({started_from.model_id[:8]}), there are no new web pairs and the settings are "
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


def note_origin(run: Run) -> str | None:
    """Write down what a later round starts from and why, once its URLs are in; None in round 1."""
    record = rounds.read_round(run.lake, run.round)
    before = rounds.read_round(run.lake, run.round - 1) if run.round > 1 else None
    if record is None or before is None:
        return None
    if record.origin is None:
        start = models.starting_model_of(run.lake, record)
        with connect(run.lake) as connection:
            fresh = connection.execute(
                "SELECT count(*) FROM pairs WHERE pool = 'web' AND status = 'ok' AND shard >= ?",
                [layout.web_shards(run.round)],
            ).fetchall()[0][0]
        changed = explain(before.settings, record.settings)
        origin = (
            f"starts from {start.model_id[:8]} of round {start.round}: {_ended(before)}; new web images: "
            f"{fresh}; settings: {'; '.join(changed) or 'as before'}"
        )
        record = dataclasses.replace(record, origin=origin)
        rounds.write_round(run.lake, record)
        logger.info("round %d %s", run.round, origin)
    return record.origin


def _ended(record: RoundRecord) -> str:
    """How the round before ended, and what that means for the next one."""
    number = record.round
    return {
        "promoted": f"round {number} was promoted",
        "needs a person": f"round {number} waits for a person (`bootstrap promote {number} "
        '--because "..."` takes it)',
    }.get(record.status, f"round {number} was {record.status}")


def _brings_something(run: Run, pairs: PartRef) -> bool:
    """Whether a part has an image, or a text of one: what was asked for again may have failed again."""
    texts = committed_part(run.lake, "captions", pairs.name, round=0)
    parts = [pairs] if texts is None else [pairs, texts]
    return any(part_manifest(run.lake, part).num_ok for part in parts)


def _forget_round(run: Run) -> None:
    """Remove the record of a round that made nothing, and the rows that failed once more."""
    own = layout.web_shards(run.round)
    failed = [*list_parts(run.lake, "captions", 0), *list_parts(run.lake, "pairs")]
    for part in [part for part in failed if part.name.startswith(own)]:
        drop_part(run.lake, part)
    for part in list_parts(run.lake, "rounds", run.round):
        drop_part(run.lake, part)
    run.lake.root.remove(layout.round_dir(run.round))
