"""Rows of a shard with what was fetched for them, looked at some rows ahead in several threads.

Decoding and resizing leave the interpreter to others, so that threads help; what depends on other rows (which picture
was the first of its kind) is left to whoever takes the rows in their order.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from storage import ids
from storage.intake.download_config import DownloadConfig
from storage.intake.images import inspect_image
from storage.intake.looks import Looks
from storage.intake.passes import PassResults
from storage.schemas import OK

THREADS = min(8, os.cpu_count() or 1)
AHEAD = 4 * THREADS
"""Rows, and so images in memory."""


Row = TypeVar("Row")
Seen = TypeVar("Seen")

OF_THE_IMAGE = ("phash", "looks", "width", "height")
"""Columns of a pair that are read off its image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """A row of `pairs` in the making; image and looks are there when it is ok so far."""

    pair: dict[str, Any]
    image: bytes | None = None
    looks: Looks | None = None
    ext: str = ""


def looked_at(
    planned: Iterable[dict[str, Any]], results: PassResults, config: DownloadConfig
) -> Iterator[Looked]:
    """Each planned row of a shard, in order."""
    return ahead(lambda row: _look(row, results, config), planned)


def ahead(look: Callable[[Row], Seen], rows: Iterable[Row]) -> Iterator[Seen]:
    """What `look` gives of each row, in order, some rows ahead in several threads."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="look") as pool:
        pending: deque[Future[Seen]] = deque()
        for row in rows:
            pending.append(pool.submit(look, row))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _look(row: dict[str, Any], results: PassResults, config: DownloadConfig) -> Looked:
    own = ("row", "key", "source_name", "url", "alt_text", "licence", "extra", "status", "reason")
    pair = {name: row[name] for name in own} | {"pool": "web", "attempts": 0}
    if pair["status"] is not None:
        return Looked(pair=pair)
    result = results.get(row["n"])
    pair["attempts"] = results.attempts(row["n"])
    if result is None:
        pair |= {"status": "lost", "reason": "img2dataset left no record of this row"}
        return Looked(pair=pair)
    pair["fetched_at"] = result.fetched_at
    if result.image is None:
        pair |= {"status": result.status, "reason": result.error}
        return Looked(pair=pair)
    return inspected(pair, result.image, config)


def inspected(pair: dict[str, Any], image: bytes, config: DownloadConfig) -> Looked:
    """A row with what its image's bytes show."""
    found = inspect_image(image, config.min_image_side_px, config.max_image_pixels)
    pair |= {"status": found.status, "reason": found.reason}
    if found.status != OK:
        return Looked(pair=pair)
    looks = found.looks
    assert looks is not None
    pair |= {"image_id": ids.image_id(image), "phash": looks.phash}
    pair |= {"looks": looks.to_bytes(), "width": found.width, "height": found.height}
    return Looked(pair=pair, image=image, looks=looks, ext=found.ext)
