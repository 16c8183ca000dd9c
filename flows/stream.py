"""Images of many shards in order, read and decoded ahead of the model across the borders of shards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch

from flows.decoders import CHUNK_IMAGES, Decoded, Decoders
from flows.patience import patiently
from storage import CorruptShard, Lake
from storage.spans import Wanted, read_images

BLOCK_IMAGES, BLOCK_BYTES = 8 * CHUNK_IMAGES, 32 << 20
"""Most images, and bytes of their files, that are asked for together: neighbours come in one read."""
READERS = 2
PLANS_AHEAD = 4
"""Shards that are looked at before their turn: enough that small ones overlap too."""
AHEAD_BYTES = 1 << 30
"""Most memory of decoded images that wait for the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image of a shard: where its bytes are."""

    image_id: str
    shard: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image as the model's transforms made it, or why there is none."""

    row: ImageRow
    place: int
    """Among the images of its shard, from 0."""
    pixels: tuple[torch.Tensor, ...]
    """What each transform made of it; of no use with an error."""
    error: str | None
    is_unreadable: bool = False
    """Whether the shard, not the picture, is at fault."""


class HasImages(Protocol):
    """Work on the images of one shard."""

    @property
    def images(self) -> Sequence[ImageRow]:
        """The images that it needs, in order."""


J = TypeVar("J", bound=HasImages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece(Generic[J]):
    """Some pictures of one job, in order; seconds of the threads that read and decoded them."""

    job: J
    pictures: list[Picture]
    is_last: bool
    waited_s: float = 0.0
    """How long whoever asked had to wait."""
    read_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Block:
    """Bytes of neighbouring images."""

    images: list[bytes | CorruptShard]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ahead(Generic[J]):
    """A piece that is on its way; `decoded` is None for a shard without images."""

    job: J
    first: int
    """Place of its block's first image in the job."""
    start: int
    """Place of its own first image in the block."""
    count: int
    block: Future[_Block] | None
    decoded: Future[tuple[_Block, Decoded]] | None
    is_last: bool


class ImageStream(Generic[J]):
    """Iterate over pieces of jobs in order; `close` it, or use it as a context.

    At most `ahead` images, and AHEAD_BYTES of them, wait decoded.
    """

    def __init__(
        self,
        lake: Lake,
        jobs: Iterator[J],
        decoders: Decoders,
        *,
        ahead: int,
        plans_ahead: int = PLANS_AHEAD,
    ) -> None:
        """Take up to `plans_ahead` jobs from `jobs`, in a thread, before their turn comes."""
        self._lake, self._decoders = lake, decoders
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self.look_ahead(ahead)
        self._jobs = jobs
        self._plans: deque[Future[J | None]] = deque()
        for _ in range(plans_ahead):
            self._plan_another()
        self._current: Iterator[_Ahead[J]] = iter(())
        self._queue: deque[_Ahead[J]] = deque()
        self._num_queued = 0

    def __enter__(self) -> ImageStream[J]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Piece[J]]:
        """Pieces in order; an error of a job comes after all pieces of the jobs before it."""
        while True:
            began = time.perf_counter()
            self._fill()
            if not self._queue:
                return
            item = self._queue.popleft()
            self._num_queued -= item.count
            yield self._piece_of(item, began)

    def look_ahead(self, images: int) -> None:
        """Let about so many images wait decoded from now on: more than the decoders have in hand, at most AHEAD_BYTES."""
        least = 2 * self._decoders.workers * CHUNK_IMAGES
        most = max(1, AHEAD_BYTES // max(1, self._decoders.image_bytes))
        self._most_ahead = min(max(images, least), most)

    def close(self) -> None:
        """Drop what is ahead."""
        for item in self._queue:
            for future in (item.decoded, item.block):
                if future is not None:
                    future.cancel()
        self._queue.clear()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._planner.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        """Send for pieces until enough are ahead; waits for a job's plan only when nothing else is there."""
        while self._num_queued < self._most_ahead:
            item = next(self._current, None)
            if item is not None:
                self._queue.append(item)
                self._num_queued += item.count
            elif not self._open_next():
                return

    def _open_next(self) -> bool:
        """Begin to cut the next job, if there is one and its turn has come."""
        if not self._plans:
            return False
        plan = self._plans[0]
        if self._queue and (not plan.done() or plan.exception() is not None):
            return False
        job = plan.result()
        if job is None:
            self._plans.clear()
            return False
        self._plans.popleft()
        self._plan_another()
        self._current = self._cut(job)
        return True

    def _plan_another(self) -> None:
        self._plans.append(self._planner.submit(next, self._jobs, None))

    def _cut(self, job: J) -> Iterator[_Ahead[J]]:
        """The pieces of a job, sent for when they are asked for."""
        images, first = job.images, 0
        while first < len(images):
            rows = _block_of(images[first : first + BLOCK_IMAGES])
            block = self._readers.submit(_read, self._lake, rows)
            for start in range(0, len(rows), CHUNK_IMAGES):
                count = min(CHUNK_IMAGES, len(rows) - start)
                decoded = self._decoders.submit(_decode, self._decoders, block, start, count)
                is_last = first + start + count == len(images)
                yield _Ahead(job, first, start, count, block, decoded, is_last)
            first += len(rows)
        if not images:
            yield _Ahead(job, 0, 0, 1, None, None, is_last=True)

    def _piece_of(self, item: _Ahead[J], began: float) -> Piece[J]:
        if item.decoded is None:
            return Piece(job=item.job, pictures=[], is_last=True)
        block, decoded = item.decoded.result()
        waited_s = time.perf_counter() - began
        pictures, place = [], 0  # place: among those whose bytes could be read
        for i in range(item.start, item.start + item.count):
            data, row = block.images[i], item.job.images[item.first + i]
            picture = Picture(row=row, place=item.first + i, pixels=(), error=None)
            if isinstance(data, CorruptShard):
                pictures.append(replace(picture, error=str(data), is_unreadable=True))
                continue
            pixels = tuple(each[place] for each in decoded.pixels)
            pictures.append(replace(picture, pixels=pixels, error=decoded.errors[place]))
            place += 1
        return Piece(
            job=item.job,
            pictures=pictures,
            is_last=item.is_last,
            waited_s=waited_s,
            read_s=block.seconds if item.start == 0 else 0.0,
            decode_s=decoded.seconds,
        )


def _block_of(rows: Sequence[ImageRow]) -> Sequence[ImageRow]:
    """As many of the first rows as BLOCK_BYTES allow, one at least."""
    total = 0
    for place, row in enumerate(rows):
        total += row.size
        if total > BLOCK_BYTES and place:
            return rows[:place]
    return rows


def _read(lake: Lake, rows: Sequence[ImageRow]) -> _Block:
    """The bytes of neighbouring images; all are of one shard but for human pairs of several."""
    began = time.perf_counter()
    images: list[bytes | CorruptShard] = []
    for shard, group in groupby(rows, key=lambda row: row.shard):
        wanted = [Wanted(image_id=row.image_id, offset=row.offset, size=row.size) for row in group]
        images += patiently(read_images, lake, shard, wanted)
    return _Block(images, time.perf_counter() - began)


def _decode(
    decoders: Decoders, block: Future[_Block], start: int, count: int
) -> tuple[_Block, Decoded]:
    read = block.result()
    images = read.images[start : start + count]
    return read, decoders.decode([data for data in images if isinstance(data, bytes)])
