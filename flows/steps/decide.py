"""Deciding: one SQL policy over captions and scores; no model, no GPU."""

from __future__ import annotations

import logging

from flows.errors import MissingInput
from flows.session import Run
from flows.steps.shards import web_parts
from storage import PartRef, decide, list_parts, part_manifest, rounds
from storage.generations import active_generation

logger = logging.getLogger(__name__)


def decide_round(run: Run) -> PartRef:
    """Decide on every web and synthetic caption of the round, or find it decided the same way.

    Raises:
        MissingInput: some shard has not been scored in this round.
    """
    settings = run.settings.decide
    require_scores(run)
    part = decide(
        run.lake,
        run.round,
        policy=settings.policy,
        params=settings.given_params,
        activate=_counts_from_now_on(run),
        of_round=True,
        on_stale=run.on_stale,
        time_limit_s=settings.time_limit_s,
    )
    if not part_manifest(run.lake, part).num_ok:
        logger.warning(
            "round %d: policy %s kept none of %d texts; look at the filter (SELECT source, "
            "median(itm_prob) FROM verdicts GROUP BY source) before you trust this round",
            run.round,
            settings.policy,
            part.num_rows,
        )
    logger.info("round %d policy %s: %d decisions", run.round, settings.policy, part.num_rows)
    return part


def require_scores(run: Run) -> None:
    """Raises MissingInput when some shard has not been scored in this round."""
    scored = {part.name for part in list_parts(run.lake, "scores", run.round)}
    missing = [part.name for part in web_parts(run) if part.name not in scored]
    if missing:
        raise MissingInput(
            f"{len(missing)} shards have no scores of round {run.round}, {missing[0]} among them; run "
            "`bootstrap score` first"
        )


def _counts_from_now_on(run: Run) -> bool:
    """Whether the round's own decisions take effect: not where another was chosen by hand after the round's end."""
    record, active = rounds.read_round(run.lake, run.round), active_generation(run.lake, run.round)
    by_hand = active is not None and active.generation != active.of_round
    if by_hand and record is not None and record.status != "running":
        assert active is not None
        logger.info(
            "round %d: %s still counts, which was chosen by hand; `bootstrap decide --activate` lets the round's "
            "own count again",
            run.round,
            active.generation,
        )
        return False
    return True
