"""Captioning and scoring of many shards as one step: found again when killed, stopped cleanly when asked."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flows.curators import Curators
from flows.session import Run
from flows.steps.curate import Curation
from flows.steps.shard_jobs import Seconds, ShardDone, new_seconds
from flows.steps.shards import web_parts
from flows.stopping import stopped_by_sigterm
from storage import ModelRef, PartRef

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]


@dataclass(kw_only=True, slots=True)
class Curated:
    """What a stage made and found."""

    parts: list[PartRef] = field(default_factory=list)
    built: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Rows that were written, by status."""
    timings: Seconds = field(default_factory=new_seconds)
    """Seconds by step, summed over threads and processes."""
    num_images: int = 0
    """Images that were decoded."""
    seconds: float = 0.0

    @property
    def speed(self) -> dict[str, float]:
        """Images a second, and the share of the time that the models waited for images; empty when nothing was made."""
        if not self.num_images or not self.seconds:
            return {}
        worked = sum(self.timings[step] for step in ("wait", "encode", "generate", "score"))
        return {
            "images_per_s": round(self.num_images / self.seconds, 3),
            "share_waited": round(self.timings["wait"] / max(worked, 1e-9), 4),
        }


class Tally:
    """Counts what is done, and shows it: rows, rate, time left, outcomes."""

    def __init__(self, num_rows: int, progress: Progress) -> None:
        self.curated = Curated()
        self._num_rows, self._progress = num_rows, progress
        self._done_rows = 0
        self._images: dict[str, int] = {}
        """Images taken of shards that are under way."""
        self._num_images, self._began = 0, time.monotonic()

    def images(self, pairs: PartRef, count: int) -> None:
        """Some images of a shard have been taken."""
        self._images[pairs.name] = self._images.get(pairs.name, 0) + count
        self._num_images += count
        self._show(pairs.name)

    def shard(self, done: ShardDone) -> None:
        """A shard is committed, or was found so."""
        self._images.pop(done.pairs.name, None)
        self._done_rows += done.pairs.num_rows
        self.curated.num_images += done.num_images
        self.curated.parts += done.parts
        self.curated.built += done.built
        self.curated.outcomes.update(done.outcomes)
        for step, seconds in done.timings.items():
            self.curated.timings[step] += seconds
        self._show(done.pairs.name)

    def give_back(self, pairs: PartRef) -> None:
        """A shard that was under way is begun again."""
        self._images.pop(pairs.name, None)

    def _show(self, name: str) -> None:
        done = self._done_rows + sum(self._images.values())
        self._progress(min(done, self._num_rows), self._num_rows, f"shard {name}{self._pace(done)}")

    def _pace(self, done: int) -> str:
        """Images a second, time left, and rows by outcome."""
        seconds = time.monotonic() - self._began
        told = ""
        if self._num_images and seconds > 0:
            rate = self._num_images / seconds
            told = f", {rate:.3g} images/s, {_duration((self._num_rows - done) / rate)} left"
        counts = ", ".join(
            f"{status} {count}" for status, count in sorted(self.curated.outcomes.items())
        )
        return f"{told}; {counts}" if counts else told


def curate_shards(
    run: Run, captioner: ModelRef | None, scorer: ModelRef | None, progress: Progress
) -> Curated:
    """Caption, score, or do both in one pass, for every web shard of the round.

    What is committed is found. Raises Stopped after SIGTERM.
    """
    shards = web_parts(run)
    tally = Tally(sum(part.num_rows for part in shards), progress)
    began = time.monotonic()
    with stopped_by_sigterm() as stop:
        if run.settings.machine.curate_processes > 1 and len(shards) > 1:
            Curators(run, captioner, scorer, tally, stop).run_shards(shards)
        else:
            Curation(run, captioner, scorer, tally, stop).run_shards(shards, expected=len(shards))
    tally.curated.seconds = time.monotonic() - began
    _log_speed(tally.curated)
    return tally.curated


def caption_shard(
    run: Run, pairs: PartRef, captioner: ModelRef, on_progress: Callable[[int], None]
) -> tuple[PartRef, bool]:
    """Caption the ok web images of one pairs part; returns the part and whether it was built.

    Captions are seeded by (seed, image_id, index).
    """
    return _one_shard(run, pairs, captioner, None, on_progress)


def score_shard(
    run: Run, pairs: PartRef, scorer: ModelRef, on_progress: Callable[[int], None]
) -> tuple[PartRef, bool]:
    """Score the web and synthetic captions of one pairs part; the image is encoded once for all.

    Returns the part and whether it was built. The text of a failed row is a row with its error.
    """
    return _one_shard(run, pairs, None, scorer, on_progress)


def _one_shard(
    run: Run,
    pairs: PartRef,
    captioner: ModelRef | None,
    scorer: ModelRef | None,
    on_progress: Callable[[int], None],
) -> tuple[PartRef, bool]:
    tally = Tally(pairs.num_rows, lambda done, total, note: on_progress(done))
    Curation(run, captioner, scorer, tally).run_shards([pairs])
    return tally.curated.parts[0], tally.curated.built > 0


def _log_speed(curated: Curated) -> None:
    if not curated.speed:
        return
    steps = ", ".join(f"{step} {took:.1f} s" for step, took in sorted(curated.timings.items()))
    logger.info(
        "%.4g images/s; models waited for images %.1f %% of their time; by step: %s",
        curated.speed["images_per_s"],
        100.0 * curated.speed["share_waited"],
        steps,
    )


def _duration(seconds: float) -> str:
    """A time in the largest unit that shows something."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
