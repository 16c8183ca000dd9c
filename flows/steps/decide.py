"""Deciding: one SQL policy over captions and scores; no model, no GPU."""

from __future__ import annotations

import logging

from flows.errors import MissingInput
from flows.session import Run
from flows.steps.shards import web_parts
from storage import PartRef, connect, decide, list_parts

logger = logging.getLogger(__name__)


def decide_round(run: Run) -> PartRef:
    """Decide on every web and synthetic caption of the round, or find it decided the same way.

    Raises:
        MissingInput: some shard has not been scored in this round.
    """
    settings = run.settings.decide
    scored = {part.name for part in list_parts(run.lake, "scores", run.round)}
    missing = [part.name for part in web_parts(run) if part.name not in scored]
    if missing:
        raise MissingInput(
            f"{len(missing)} shards have no scores of round {run.round}, {missing[0]} among them; run "
            "`bootstrap score` first"
        )
    part = decide(
        run.lake,
        run.round,
        policy=settings.policy,
        params={} if settings.threshold is None else {"threshold": settings.threshold},
        on_stale=run.on_stale,
    )
    with connect(run.lake) as connection:
        kept = connection.execute(
            "SELECT count(*) FILTER (WHERE kept) FROM decisions WHERE round = ?", [run.round]
        ).fetchall()[0][0]
    if not kept:
        logger.warning(
            "round %d: policy %s kept none of %d texts; look at the filter (SELECT source, "
            "median(itm_prob) FROM verdicts GROUP BY source) before you trust this round",
            run.round,
            settings.policy,
            part.num_rows,
        )
    logger.info("round %d policy %s: %d decisions", run.round, settings.policy, part.num_rows)
    return part
