"""Deciding: one SQL policy over captions and scores; no model, no GPU."""

from __future__ import annotations

import logging

from flows.session import Run
from storage import PartRef, decide

logger = logging.getLogger(__name__)


def decide_round(run: Run) -> PartRef:
    """Decide on every web and synthetic caption of the round, or find it decided the same way."""
    settings = run.settings.decide
    part = decide(
        run.lake,
        run.round,
        policy=settings.policy,
        params={} if settings.threshold is None else {"threshold": settings.threshold},
        on_stale=run.on_stale,
    )
    logger.info("round %d policy %s: %d decisions", run.round, settings.policy, part.num_rows)
    return part
