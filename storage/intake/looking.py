"""Rows of a shard with what was fetched for them, large pictures looked at some rows ahead in several threads.

Decoding leaves the interpreter to others, so that threads help where there is much to decode; a small picture is many short calls,
between which threads only wait for one another. What depends on other rows (which picture was the first of its kind) is
left to whoever takes the rows in their order.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
SMALL_BYTES = 64 << 10
"""Images of no more are looked at as they come."""


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

    def look(row: tuple[dict[str, Any], bytes | None]) -> Looked:
        pair, image = row
        return Looked(pair=pair) if image is None else inspected(pair, image, config)

    rows = (_read(row, results) for row in planned)
    return ahead(look, rows, lambda row: len(row[1] or b""))


def ahead(
    look: Callable[[Row], Seen], rows: Iterable[Row], num_bytes: Callable[[Row], int]
) -> Iterator[Seen]:
    """What `look` gives of each row, in order; of large ones some rows ahead, in several threads."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="look") as pool:
        pending: deque[Callable[[], Seen]] = deque()
        for row in rows:
            if num_bytes(row) > SMALL_BYTES:
                pending.append(pool.submit(look, row).result)
            else:
                pending.append(partial(_same, look(row)))
            if len(pending) > AHEAD:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()


def _same(seen: Seen) -> Seen:
    return seen


def _read(row: dict[str, Any], results: PassResults) -> tuple[dict[str, Any], bytes | None]:
    """A row of `pairs` in the making, and the bytes of its image when there is one."""
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
