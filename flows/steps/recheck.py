"""Kept web images asked for again: those that have opted out since, or were taken down, are purged."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.purge_bases import around
from flows.session import opened
from flows.settings import BootstrapSettings
from flows.steps.ingest import download_config, served_lists
from storage import Lake, layout, rounds
from storage.errors import LakeNotFound
from storage.intake.recheck import Recheck, recheck
from storage.purge import Purged, Request, asked_image, purge, resume

if TYPE_CHECKING:
    from storage.purge.run import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rechecked:
    """What asking again has shown, and what was purged for it."""

    part: int
    """The share whose turn it was, from 0."""
    parts: int
    found: Recheck
    purged: tuple[Purged, ...]


def recheck_lake(
    lake: Lake,
    settings: BootstrapSettings,
    *,
    within: int,
    most: int,
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> Rechecked:
    """Ask for the share whose turn it is by the latest round, and purge what wishes to go."""
    last = rounds.latest_round(lake)
    turn = last.round if last is not None else 0
    with served_lists(settings) as given:
        found = recheck(lake, download_config(given), part=turn, parts=within, most=most)
    purged = []
    for reason, image_ids in sorted(found.to_purge.items()):
        if not dry_run:
            asked = tuple(asked_image(each) for each in image_ids)
            purged.append(purge(lake, Request(asked=asked, because=reason), around(on_progress)))
    return Rechecked(part=turn % within, parts=within, found=found, purged=tuple(purged))


def recheck_before_round(settings: BootstrapSettings) -> Rechecked | None:
    """`recheck_lake` once before a later round, as the settings say; None where it is off, done, or has no round to follow.

    A purge that was killed is finished first. A round that is gone on with is not preceded by another recheck.
    """
    within = settings.ingest.recheck_within_rounds
    if within is None:
        return None
    try:
        lake = opened(settings, create=False)
    except LakeNotFound:
        return None  # the round itself says what to do
    if lake.root.exists(layout.PURGE_BEGUN):
        resume(lake, around())
    ended = [each.round for each in rounds.list_rounds(lake) if each.status != "running"]
    if not ended or lake.root.exists(layout.recheck_record(max(ended))):
        return None
    done = recheck_lake(lake, settings, within=within, most=settings.ingest.recheck_most)
    record = {
        "part": done.part,
        "parts": done.parts,
        "outcomes": dict(done.found.outcomes.most_common()),
        "purges": {each.plan.because: each.plan.purge_id for each in done.purged if each.plan},
    }
    lake.root.write_bytes(layout.recheck_record(max(ended)), json.dumps(record, indent=1).encode())
    logger.info("asked again for %d kept images: %s", done.found.outcomes.total(), record)
    return done
