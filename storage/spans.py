"""Many images of one shard at once: neighbours in one read, each checked against its id.

Where nearly every image of a stretch is wanted, the stretch is read from end to end; where few are, each is a range
read of its own. What is not where the tables say is looked for in the whole tar before it is given up.
"""

import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from storage import ids
from storage.adopted import place_of
from storage.errors import CorruptShard
from storage.lake import Lake
from storage.shards import read_image

logger = logging.getLogger(__name__)

SPAN_BYTES = 16 << 20
"""Most bytes of one read."""
GAP_BYTES = 256 << 10
"""Unwanted bytes between two images that are read over: cheaper than a second read, on a disk and on a store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One image of a shard: its id, and where its bytes lie."""

    image_id: str
    offset: int
    size: int


def read_images(lake: Lake, shard: str, wanted: Sequence[Wanted]) -> list[bytes | CorruptShard]:
    """The stored bytes of images of one shard in the order of `wanted`, in as few reads as make sense.

    An image that the shard does not hold, or holds changed or cut off, has its error in its place. Raises CorruptShard
    when there is no such shard, TransientError when the store did not answer.
    """
    found: list[bytes | CorruptShard] = [CorruptShard("not read")] * len(wanted)
    root, path = place_of(lake, shard)
    for places in spans(wanted):
        first = wanted[places[0]].offset
        last = max(wanted[place].offset + wanted[place].size for place in places)
        try:
            block = root.read_range(path, first, last - first)
        except FileNotFoundError:
            read_image(lake, shard, first, 1)  # says what is gone, and the remedy
            raise
        except OSError:
            if first < root.size(path):
                raise
            block = b""  # a store refuses a range behind the end; a disk gives nothing
        for place in places:
            want = wanted[place]
            data = block[want.offset - first : want.offset - first + want.size]
            found[place] = (
                data if ids.image_id(data) == want.image_id else _elsewhere(lake, shard, want)
            )
    return found


def spans(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Places of `wanted` that are read together, by offset."""
    together: list[list[int]] = []
    start = end = 0
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place].offset):
        want = wanted[place]
        until = want.offset + want.size
        if together and want.offset - end <= GAP_BYTES and until - start <= SPAN_BYTES:
            together[-1].append(place)
        else:
            together.append([place])
            start = end = want.offset
        end = max(end, until)
    return together


def _elsewhere(lake: Lake, shard: str, want: Wanted) -> bytes | CorruptShard:
    """The image from where it lies now, when a shard has lost a member and the others have moved up."""
    root, path = place_of(lake, shard)
    num_bytes = root.size(path)
    place = _index(lake, shard, num_bytes).get(want.image_id)
    if place is not None:
        data = read_image(lake, shard, *place)
        if ids.image_id(data) == want.image_id:
            return data
    end = want.offset + want.size
    return CorruptShard(
        f"shard {path} has not the image at bytes {want.offset} to {end}, nor anywhere else; restore it "
        "from a copy, or run `bootstrap repair` and the ingest stage to fetch its images again"
    )


@lru_cache(maxsize=4)
def _index(lake: Lake, shard: str, num_bytes: int) -> dict[str, tuple[int, int]]:
    """image_id -> (offset, size) of every whole member of a damaged tar of `num_bytes` bytes."""
    places: dict[str, tuple[int, int]] = {}
    try:
        root, path = place_of(lake, shard)
        with root.open(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                data = file.read() if file is not None else b""
                places[ids.image_id(data)] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as err:
        logger.warning("shard %s breaks off after %d members: %s", shard, len(places), err)
    logger.warning("shard %s is not as it was written: %d members were found", shard, len(places))
    return places
