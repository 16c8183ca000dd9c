"""Images inside shards, overwritten with zeros: same members, same sizes, same offsets, other bytes.

A shard is written once more, whole, in one move: every other image lies where it lay. What goes is the image and its
sidecars (`<key>.json`, which holds address and text); the header, which names the member by the key of its row, stays.
"""

import logging
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from storage import layout
from storage.fs import explained
from storage.lake import Lake

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""(offset, size) of bytes in a shard."""

_COPIED_BYTES = 1 << 20


def blank(lake: Lake, shard: str, images: Sequence[Place]) -> int:
    """Overwrite images of a shard and their sidecars; how many bytes. Nothing when the shard is not there.

    Nothing is written when all of it is zeros already.
    """
    path = layout.shard(shard)
    if not lake.root.exists(path):
        return 0
    with lake.root.open(path) as f:
        places = members(f, images)
        if is_blank(f, places):
            return 0
    with lake.root.staged(path) as tmp, explained(lake.root, path):
        with lake.root.open(path) as f, tmp.open("wb") as out:
            while block := f.read(_COPIED_BYTES):
                out.write(block)
        end = tmp.stat().st_size
        with tmp.open("r+b") as out:
            for offset, size in places:
                out.seek(offset)
                out.write(bytes(max(0, min(size, end - offset))))
    return sum(size for _, size in places)


def is_blank(f: BinaryIO, places: Sequence[Place]) -> bool:
    """Whether there is nothing but zeros at some places of an opened shard."""
    for offset, size in places:
        f.seek(offset)
        left = size
        while left and (block := f.read(min(left, _COPIED_BYTES))):
            if block.strip(b"\0"):
                return False
            left -= len(block)
    return True


def members(f: BinaryIO, images: Sequence[Place]) -> list[Place]:
    """Where images and their sidecars lie in an opened shard.

    A sidecar has the key of its image. Those that follow it are found from the image itself, so that a shard that is
    damaged elsewhere loses them too; others by going through the shard, as far as that goes.
    """
    places, keys = set(images), set()
    for offset, size in images:
        header = _header(f, offset - tarfile.BLOCKSIZE)
        if header is None:
            logger.warning(
                "no tar header before byte %d: its sidecars are looked for by nothing", offset
            )
            continue
        keys.add(_key(header))
        places |= set(_following(f, offset, size, _key(header)))
    f.seek(0)
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                if _key(member) in keys:
                    places.add((member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as err:
        logger.warning("a shard with purged images breaks off: %s", err)
    return sorted(places)


def _following(f: BinaryIO, offset: int, size: int, key: str) -> Iterator[Place]:
    """The members after an image that have its key."""
    while True:
        at = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        header = _header(f, at)
        if header is None or _key(header) != key:
            return
        offset, size = at + tarfile.BLOCKSIZE, header.size
        yield offset, size


def _header(f: BinaryIO, at: int) -> tarfile.TarInfo | None:
    if at < 0:
        return None
    f.seek(at)
    try:
        return tarfile.TarInfo.frombuf(f.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _key(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]
