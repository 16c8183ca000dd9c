"""A piece: some images in a row that are written, recorded and resumed together."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from PIL import Image, UnidentifiedImageError

from storage.errors import CorruptShard
from storage.exports.selection import Picked
from storage.intake.images import EXTENSIONS
from storage.lake import Lake
from storage.spans import Wanted, read_images

CHUNK_IMAGES = 64
"""Images whose bytes are in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image of a piece with its bytes."""

    picked: Picked
    data: bytes
    ext: str
    """File extension without a dot, such as jpg."""

    @property
    def path(self) -> str:
        """Where it lies when images are files of their own."""
        return f"images/{self.picked.image_id[:2]}/{self.picked.image_id}.{self.ext}"


@dataclass(kw_only=True)
class Piece:
    """Consecutive images of an export."""

    lake: Lake
    index: int
    images: Sequence[Picked]
    first_image: int = 0
    """Images written by the pieces before it."""
    first_text: int = 0
    """Texts written by the pieces before it."""
    lost: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Images that could not be read, by id; complete once `chunks` has been read through."""

    @property
    def name(self) -> str:
        """Its number, as names of files have it."""
        return f"{self.index:05d}"

    @property
    def written(self) -> list[Picked]:
        """The images that could be read."""
        return [picked for picked in self.images if picked.image_id not in self.lost]

    def chunks(self, min_texts: int = 1) -> Iterator[list[Picture]]:
        """The images with so many texts or more with their bytes, some at a time, in order.

        Those that cannot be read become `lost`.
        """
        wanted = [
            picked
            for picked in self.images
            if len(picked.texts) >= min_texts and picked.image_id not in self.lost
        ]
        for shard, group in groupby(wanted, key=lambda picked: picked.shard):
            of_shard = list(group)
            for start in range(0, len(of_shard), CHUNK_IMAGES):
                yield self._read(shard, of_shard[start : start + CHUNK_IMAGES])

    def _read(self, shard: str, chunk: list[Picked]) -> list[Picture]:
        wanted = [Wanted(image_id=p.image_id, offset=p.offset, size=p.size) for p in chunk]
        try:
            found = read_images(self.lake, shard, wanted)
        except CorruptShard as err:
            found = [err] * len(chunk)
        pictures = []
        for picked, data in zip(chunk, found, strict=True):
            if isinstance(data, bytes):
                pictures.append(Picture(picked=picked, data=data, ext=extension(data)))
            else:
                self.lost[picked.image_id] = {
                    "image_id": picked.image_id,
                    "shard": shard,
                    "num_texts": len(picked.texts),
                    "reason": str(data),
                }
        return pictures


def extension(data: bytes) -> str:
    """The file extension of an image's format, `bin` when no format is known."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return EXTENSIONS.get(image.format or "", "bin")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return "bin"


def json_line(record: Any) -> str:
    """JSON on one line, in the order given, other alphabets as they are."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)
