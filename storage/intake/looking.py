"""Rows of a part with what their pictures show, looked at some rows ahead in several processes.

A look at a picture is many short calls, between which threads only wait for one another. What depends on other rows (which
picture was the first of its kind) is left to whoever takes the rows in their order.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.intake.download_config import DownloadConfig
from storage.intake.images import Inspected
from storage.intake.look_worker import Seen, see
from storage.intake.looks import Looks
from storage.intake.passes import PassResults
from storage.schemas import OK
from storage.worker_pool import WorkerPool
from storage.worker_process import WorkerProcess

WORKERS = min(8, os.cpu_count() or 1)
CHUNK_ROWS, CHUNK_BYTES = 32, 2 << 20
"""Rows that a process gets at a time: not many more bytes than this, unless it is one row."""
AHEAD = 2 * WORKERS
"""Chunks, and so pictures in memory."""
FEW = 64
"""So many pictures are looked at before a process is started for more."""
SILENCE_S = 300.0
"""A process that says nothing for so long over one chunk is taken for dead."""

WORKER = "storage.intake.look_worker"
_FATAL: Seen = (Inspected(status="decode_error", reason="brings the decoder down"), "")

Row = TypeVar("Row")

OF_THE_IMAGE = ("phash", "looks", "width", "height")
"""Columns of a pair that are read off its image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """A row of `pairs` in the making; image and looks are there when it is ok so far."""

    pair: dict[str, Any]
    image: bytes | None = None
    looks: Looks | None = None
    ext: str = ""


class Lookers:
    """Threads, each with a process of its own once there is more than a little to look at; use it in a `with`."""

    def __init__(self, config: DownloadConfig) -> None:
        self._limits = (config.min_image_side_px, config.max_image_pixels)
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="look")
        self._processes = WorkerPool(lambda: WorkerProcess(WORKER), "looks at pictures")
        self._lock = threading.Lock()
        self._num_seen = 0

    def __enter__(self) -> "Lookers":
        return self

    def __exit__(self, *raised: object) -> None:
        self._processes.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._processes.join()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that are there."""
        return self._processes.pids

    def looked_at(
        self,
        rows: Iterable[Row],
        read: Callable[[Row], tuple[dict[str, Any], bytes | None]],
        num_bytes: Callable[[Row], int],
    ) -> Iterator[tuple[Row, Looked]]:
        """Each row, in order.

        `read` gives the pair of a row, and its picture when there is one; it is called from several threads.
        `num_bytes` says about how large that is.
        """

        def look(chunk: list[Row]) -> list[tuple[Row, Looked]]:
            made = [read(row) for row in chunk]
            seen = iter(self._see([image for _, image in made if image is not None]))
            return [
                (row, Looked(pair=pair) if image is None else _looked(pair, image, *next(seen)))
                for row, (pair, image) in zip(chunk, made, strict=True)
            ]

        pending: deque[Future[list[tuple[Row, Looked]]]] = deque()
        for chunk in _chunks(rows, num_bytes):
            pending.append(self._threads.submit(look, chunk))
            if len(pending) > AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    def _see(self, images: list[bytes]) -> list[Seen]:
        with self._lock:
            self._num_seen += len(images)
            are_few = self._num_seen <= FEW
        if are_few:
            return [see(image, self._limits) for image in images]
        if not images:
            return []
        parts = self._processes.answers(images, self._ask, lambda _: [_FATAL])
        return [seen for part in parts for seen in part]

    def _ask(self, process: WorkerProcess, images: list[bytes]) -> list[Seen]:
        seen: list[Seen] = process.ask((images, self._limits), SILENCE_S)
        return seen


def read_fetched(row: dict[str, Any], results: PassResults) -> tuple[dict[str, Any], bytes | None]:
    """A planned row as a row of `pairs` in the making, and the bytes of its image when there is one."""
    own = ("row", "key", "source_name", "url", "alt_text", "licence", "extra", "status", "reason")
    pair = {name: row[name] for name in own} | {"pool": "web", "attempts": 0}
    if pair["status"] is not None:
        return pair, None
    result = results.get(row["n"])
    pair["attempts"] = results.attempts(row["n"])
    if result is None:
        pair |= {"status": "lost", "reason": "img2dataset left no record of this row"}
        return pair, None
    pair["fetched_at"] = result.fetched_at
    if result.image is None:
        pair |= {"status": result.status, "reason": result.error}
    return pair, result.image


def _looked(pair: dict[str, Any], image: bytes, found: Inspected, image_id: str) -> Looked:
    """A row with what its image's bytes show."""
    pair |= {"status": found.status, "reason": found.reason}
    if found.status != OK:
        return Looked(pair=pair)
    looks = found.looks
    assert looks is not None
    pair |= {"image_id": image_id, "phash": looks.phash}
    pair |= {"looks": looks.to_bytes(), "width": found.width, "height": found.height}
    return Looked(pair=pair, image=image, looks=looks, ext=found.ext)


def _chunks(rows: Iterable[Row], num_bytes: Callable[[Row], int]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += num_bytes(row)
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
