"""What is to be done on one shard: planned from what is committed, filled by the models, committed at the end."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from flows.patience import patiently
from flows.session import Run
from flows.steps.batches import counts_of, rows_table
from flows.steps.caption import CaptionRows, caption_basis, guest_images, web_images
from flows.steps.score import ScoreRows, texts_by_image
from flows.stream import ImageRow, Picture
from storage import Clock, ModelRef, PartRef, carried_part, commit_part, committed_part, layout
from storage.fingerprint import Basis

logger = logging.getLogger(__name__)


Seconds = defaultdict[str, float]
"""By step, summed over threads."""


def new_seconds() -> Seconds:
    """No time yet in any step."""
    return defaultdict(float)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardDone:
    """A shard whose parts are committed."""

    pairs: PartRef
    parts: tuple[PartRef, ...]
    """Captions before scores."""
    built: int
    """How many of them this run wrote."""
    outcomes: dict[str, int]
    """Rows that it wrote, by status."""
    num_images: int
    """Images that were decoded for it."""
    timings: dict[str, float]


@dataclass(kw_only=True, eq=False)
class ShardJob:
    """One shard: the rows that it still lacks, and what is under way."""

    pairs: PartRef
    images: list[ImageRow]
    """Those that are decoded, its own in row order, then guests; none when everything is committed."""
    num_own: int = 0
    """The first of the images: those that lie in the shard. Guests lie in another and only have their texts scored."""
    captions: CaptionRows | None = None
    scores: ScoreRows | None = None
    found: list[PartRef] = field(default_factory=list)
    to_caption: list[Picture] = field(default_factory=list)
    to_score: list[Picture] = field(default_factory=list)
    num_taken: int = 0
    num_unreadable: int = 0
    """Images that the shard does not hold any more."""
    clock: Clock = field(default_factory=Clock)
    timings: dict[str, Seconds] = field(default_factory=lambda: defaultdict(new_seconds))
    """By table."""

    @property
    def rows(self) -> list[CaptionRows | ScoreRows]:
        """What it makes, captions first."""
        return [rows for rows in (self.captions, self.scores) if rows is not None]

    def begin(self) -> None:
        """Note that work begins: a shard may have been planned long before its turn."""
        self.clock = Clock()


def plan_shard(
    run: Run, pairs: PartRef, captioner: ModelRef | None, scorer: ModelRef | None
) -> ShardJob:
    """What one shard lacks of captions, of scores, or of both.

    Raises StaleOutput for a part that was made from something else, MissingInput when texts are to be scored that
    nobody has written.
    """
    images = patiently(web_images, run, pairs)
    job = ShardJob(pairs=pairs, images=[])
    if captioner is not None:
        basis = caption_basis(run, images, captioner)
        part = _committed(run, "captions", pairs, basis)
        if part is not None:
            job.found.append(part)
        else:
            job.captions, job.images = CaptionRows(run, captioner, basis), images
            job.num_own = len(images)
    if scorer is not None:
        texts_of = patiently(texts_by_image, run, pairs, captioned=job.captions is None)
        rows = ScoreRows(run, scorer, texts_of)
        part = None if job.captions is not None else _committed(run, rows.table, pairs, rows.basis)
        if part is not None:
            job.found.append(part)
        else:
            job.scores = rows
        if job.scores is not None and job.captions is None:
            job.images = [row for row in images if row.image_id in texts_of]
            job.num_own = len(job.images)
        if job.scores is not None:
            guests = patiently(guest_images, run, pairs)
            job.images = [*job.images, *(row for row in guests if row.image_id in texts_of)]
    return job


def _committed(run: Run, table: str, pairs: PartRef, basis: Basis) -> PartRef | None:
    """The part of this round, or an earlier round's that was made from the same things, taken over."""
    table, name = _place(run, table, pairs)
    part = committed_part(
        run.lake, table, name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if part is not None:
        return part
    return patiently(carried_part, run.lake, table, name, round=run.round, basis=basis)


def _place(run: Run, table: str, pairs: PartRef) -> tuple[str, str]:
    """Table and name of the part that is made of a shard: the round's, or that of another decoding beside it."""
    return layout.variant_table(table, run.variant), layout.variant_part(pairs.name, run.variant)


def commit_job(run: Run, job: ShardJob) -> ShardDone:
    """Write what a job has made; captions before scores, which are made of them."""
    parts, built, outcomes = list(job.found), 0, Counter[str]()
    for rows in job.rows:
        part = None
        if isinstance(rows, ScoreRows) and job.captions is not None:
            # Captions that were made anew, word for word as before, leave their scores as they are.
            part = _committed(run, rows.table, job.pairs, rows.basis)
        if part is None:
            part, statuses = _commit(run, job, rows)
            built += 1
            outcomes.update(statuses)
        parts.append(part)
    total = new_seconds()
    for seconds in job.timings.values():
        for step, took in seconds.items():
            total[step] += took
    return ShardDone(
        pairs=job.pairs,
        parts=tuple(parts),
        built=built,
        outcomes=dict(outcomes),
        num_images=job.num_taken,
        timings=dict(total),
    )


def _commit(run: Run, job: ShardJob, rows: CaptionRows | ScoreRows) -> tuple[PartRef, Counter[str]]:
    records = rows.records()
    if run.variant is not None:
        records = [record | {"variant": run.variant} for record in records]
    table, name = _place(run, rows.table, job.pairs)
    counts = counts_of([record["status"] for record in records])
    seconds = {step: round(took, 3) for step, took in job.timings[rows.table].items()}
    part = patiently(
        commit_part,
        run.lake,
        table,
        name,
        rows_table(table, records),
        round=run.round,
        basis=rows.basis,
        counts=counts,
        clock=replace(job.clock, timings=seconds),
    )
    logger.info(
        "round %d shard %s: %d %s, %d not ok",
        run.round,
        job.pairs.name,
        counts.num_in,
        table,
        counts.num_in - counts.num_ok,
    )
    return part, Counter(dict(counts.reasons) | {"ok": counts.num_ok})
