"""The runner of captioning and scoring: shards in, committed parts out, everything in between at the same time.

While the models work on one batch, threads (or processes) read and decode the next ones, across the borders of
shards, and another thread writes what is finished. Captions and scores may be made in one pass over the images or in
two; the rows are the same.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Protocol

from torch import Tensor

from blip_core import GeneratedCaption, ImageTransform, PairScore
from flows import models
from flows.decoders import Decoders
from flows.errors import Stopped
from flows.session import Run
from flows.steps.model_runner import ModelRunner
from flows.steps.shard_jobs import ShardDone, ShardJob, commit_job, plan_shard
from flows.stopping import Stop
from flows.stream import PLANS_AHEAD, ImageStream, Picture, Piece
from storage import CorruptShard, ModelRef, PartRef

logger = logging.getLogger(__name__)

WRITES_AHEAD = 2
"""Finished shards that may wait for the writer."""
WORTH_PROCESSES_BYTES = 64 << 20
"""Image files of less than this are decoded by threads before processes have started."""


class Report(Protocol):
    """Who is told how far it is."""

    def images(self, pairs: PartRef, count: int) -> None:
        """`count` more images of a shard have been taken."""

    def shard(self, done: ShardDone) -> None:
        """A shard is committed."""


class Curation:
    """Captioner, filter, or both, at work on shards; for one call of `run_shards`."""

    def __init__(
        self,
        run: Run,
        captioner: ModelRef | None,
        scorer: ModelRef | None,
        report: Report,
        stop: Stop | None = None,
    ) -> None:
        """Name the models; they are loaded when a shard needs them."""
        self._run, self._report, self._stop = run, report, stop or Stop()
        self._refs = (captioner, scorer)
        self._captioner: ModelRunner | None = None
        self._scorer: ModelRunner | None = None
        self._writing: deque[Future[ShardDone]] = deque()
        self._began = 0.0
        self._num_images = 0
        self._is_finishing = False

    def run_shards(
        self, shards: Iterable[PartRef], *, expected: int = 1, plans_ahead: int = PLANS_AHEAD
    ) -> None:
        """Work on shards in their order, about `expected` of them; each is told to the report once it is committed.

        `plans_ahead` shards are taken before their turn.

        Raises Stopped when an end was asked for, after the shard that was under way is finished or given up.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="write") as self._writer:
            try:
                outcome = self._run_jobs(self._plan(shards), expected, plans_ahead)
            finally:
                self._settle(0)
        if self._stop.is_asked:
            raise Stopped(outcome)

    def _plan(self, shards: Iterable[PartRef]) -> Iterator[ShardJob]:
        for pairs in shards:
            yield plan_shard(self._run, pairs, *self._refs)

    def _run_jobs(self, jobs: Iterator[ShardJob], expected: int, plans_ahead: int) -> str:
        """Stream from the first shard that needs a model on; returns how it ended, for whoever stopped it."""
        first = None
        while first is None:
            job = next(jobs, None)
            if job is None or self._stop.is_asked:
                return "no shard was under way"
            if job.images:
                first = job
            else:
                self._finish(job)
        transforms = self._load()
        num_bytes = expected * sum(row.size for row in first.images)
        with (
            decoders_of(self._run, transforms, num_bytes) as decoders,
            ImageStream(
                self._run.lake,
                chain([first], jobs),
                decoders,
                ahead=self._wanted_ahead,
                plans_ahead=plans_ahead,
            ) as stream,
        ):
            self._began = time.perf_counter()
            for piece in stream:
                self._take(piece)
                stream.look_ahead(self._wanted_ahead)
                if self._stop.is_asked and (ended := self._ended(piece)):
                    return ended
        return "every shard is finished"

    @property
    def _wanted_ahead(self) -> int:
        """Images of the next two batches, whose size may have been measured meanwhile."""
        return 2 * max(each.size.images for each in self._at_work)

    @property
    def _at_work(self) -> list[ModelRunner]:
        return [each for each in (self._captioner, self._scorer) if each is not None]

    def _load(self) -> list[ImageTransform]:
        """Load the models; returns their transforms, one where both see a picture alike."""
        run, (captioner, scorer) = self._run, self._refs
        if captioner is not None:
            model = models.captioner_of(run, captioner)
            self._captioner = ModelRunner(run, "caption", model, captioner)
        if scorer is not None:
            self._scorer = ModelRunner(run, "score", models.scorer_of(run, scorer), scorer)
        transforms: dict[bytes, ImageTransform] = {}
        for each in self._at_work:
            key = pickle.dumps(each.transform)
            transforms.setdefault(key, each.transform)
            each.which = list(transforms).index(key)
        return list(transforms.values())

    def _take(self, piece: Piece[ShardJob]) -> None:
        job = piece.job
        if piece.pictures:
            if not job.num_taken:
                self._begin(job)
            shared = job.timings[job.rows[0].table]
            shared["wait"] += piece.waited_s
            shared["read"] += piece.read_s
            shared["decode"] += piece.decode_s
        for picture in piece.pictures:
            self._take_picture(job, picture)
        job.num_taken += len(piece.pictures)
        self._num_images += len(piece.pictures)
        self._report.images(job.pairs, len(piece.pictures))
        if piece.is_last:
            self._caption(job)
            self._score(job)
            self._finish(job)

    def _begin(self, job: ShardJob) -> None:
        """A shard begins with a scorer that remembers no text of another.

        Features of a text differ in the last digit with the batch that they were computed in; so a resumed run,
        or another process, would write other bytes.
        """
        job.begin()
        if self._scorer is not None:
            forget = getattr(self._scorer.model, "forget_texts", None)
            if forget is not None:
                forget()

    def _take_picture(self, job: ShardJob, picture: Picture) -> None:
        if picture.error is not None:
            job.num_unreadable += picture.is_unreadable
            is_own = picture.place < job.num_own
            for rows in job.rows if is_own else filter(None, [job.scores]):
                rows.failed(picture.place, picture.row.image_id, "decode_error", picture.error)
        elif job.captions is None or picture.place >= job.num_own:
            self._queue_for_scoring(job, picture)
        else:
            assert self._captioner is not None
            job.to_caption.append(picture)
            if len(job.to_caption) >= self._captioner.size.images:
                self._caption(job)

    def _queue_for_scoring(self, job: ShardJob, picture: Picture) -> None:
        assert job.scores is not None
        assert self._scorer is not None
        if job.scores.texts_of.get(picture.row.image_id):
            job.to_score.append(picture)
            if len(job.to_score) >= self._scorer.size.images:
                self._score(job)

    def _caption(self, job: ShardJob) -> None:
        """Caption what has gathered, and hand it on to be scored when that is done in the same pass."""
        pictures, job.to_caption = job.to_caption, []
        if not pictures:
            return
        assert self._captioner is not None
        assert job.captions is not None
        model = self._captioner.model

        def write(pixels: Tensor, chosen: list[Picture]) -> list[list[GeneratedCaption]]:
            found: list[list[GeneratedCaption]] = model.caption(
                pixels, [picture.row.image_id for picture in chosen]
            )
            return found

        results = self._captioner.run(job, pictures, write)
        for picture, result in zip(pictures, results, strict=True):
            image_id = picture.row.image_id
            if isinstance(result, Exception):
                job.captions.failed(picture.place, image_id, "model_error", str(result))
                texts = []
            else:
                texts = job.captions.made(picture.place, image_id, result)
            if job.scores is not None:
                job.scores.add_texts(image_id, texts)
                self._queue_for_scoring(job, picture)

    def _score(self, job: ShardJob) -> None:
        """Score the texts of what has gathered."""
        pictures, job.to_score = job.to_score, []
        if not pictures:
            return
        assert self._scorer is not None
        assert job.scores is not None
        model, scores = self._scorer.model, job.scores

        def judge(pixels: Tensor, chosen: list[Picture]) -> list[list[PairScore]]:
            texts = [
                [text for _, text in scores.texts_of[picture.row.image_id]] for picture in chosen
            ]
            found: list[list[PairScore]] = model.score(pixels, texts)
            return found

        results = self._scorer.run(job, pictures, judge)
        for picture, result in zip(pictures, results, strict=True):
            if isinstance(result, Exception):
                scores.failed(picture.place, picture.row.image_id, "model_error", str(result))
            else:
                scores.made(picture.place, picture.row.image_id, result)

    def _finish(self, job: ShardJob) -> None:
        """Hand a shard to the writer."""
        if job.num_taken and job.num_unreadable == job.num_taken:
            raise CorruptShard(
                f"shard {job.pairs.name} of {self._run.lake.uri} holds none of its {job.num_taken} images; restore it "
                "from a copy, or run `bootstrap repair` and the ingest stage to fetch them again"
            )
        self._writing.append(self._writer.submit(commit_job, self._run, job))
        self._settle(WRITES_AHEAD)

    def _settle(self, most: int) -> None:
        """Tell of committed shards, and wait until at most `most` are being written."""
        while self._writing and (len(self._writing) > most or self._writing[0].done()):
            self._report.shard(self._writing.popleft().result())

    def _ended(self, piece: Piece[ShardJob]) -> str | None:
        """Where to leave once an end was asked for: at the shard's end if that is near, else here."""
        job, name = piece.job, f"shard {piece.job.pairs.name}"
        if piece.is_last:
            return f"{name} was finished and committed"
        if not self._is_finishing:
            rate = self._num_images / (time.perf_counter() - self._began)
            left_s = (len(job.images) - job.num_taken) / rate
            if left_s > self._run.settings.machine.stop_grace_s:
                return (
                    f"{name} was given up after {job.num_taken} of {len(job.images)} images, and nothing of it was "
                    f"written (about {left_s:.0f} s were left, machine.stop_grace_s is "
                    f"{self._run.settings.machine.stop_grace_s:g})"
                )
            self._is_finishing = True
        return None


def decoders_of(run: Run, transforms: list[ImageTransform], num_bytes: int) -> Decoders:
    """The decoders of a run that has about `num_bytes` of image files to read."""
    machine = run.settings.machine
    processes = machine.decode_in == "processes" or (
        machine.decode_in == "auto"
        and machine.decode_workers > 0
        and num_bytes >= WORTH_PROCESSES_BYTES
    )
    return Decoders(transforms, workers=max(1, machine.decode_workers), processes=processes)
