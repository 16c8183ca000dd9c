"""Image shards: webdataset tars that are written once and read by byte range. A purge leaves zeros in them.

A shard is deterministic: members in the order given, every header field fixed. A sample is the
image `<key>.<ext>` followed by `<key>.json`; the pairs table holds the image's byte range.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from storage import ids, layout
from storage.adopted import place_of
from storage.errors import CorruptShard
from storage.fs import explained
from storage.lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """One tar of samples."""

    name: str
    path: str
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image on its way into a shard."""

    key: str
    image: bytes
    ext: str
    """File extension without a dot, such as jpg."""
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRange:
    """Where the image of a sample lies in its shard, in bytes."""

    key: str
    offset: int
    size: int


def write_shard(
    lake: Lake, name: str, samples: Iterable[Sample]
) -> tuple[ShardRef, list[ImageRange]]:
    """Write a shard; the byte ranges come in the order of the samples.

    Writing a key twice is an error: a sample would hide another.
    """
    path = layout.shard(name)
    ranges: list[ImageRange] = []
    seen: set[str] = set()
    with lake.root.staged(path) as tmp:
        with explained(lake.root, path), tmp.open("wb") as f:
            with tarfile.open(fileobj=f, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    assert sample.key not in seen, f"shard {name}: key {sample.key} twice"
                    seen.add(sample.key)
                    offset = add_member(tar, f, f"{sample.key}.{sample.ext}", sample.image)
                    ranges.append(ImageRange(key=sample.key, offset=offset, size=len(sample.image)))
                    meta = json.dumps(sample.meta, sort_keys=True, ensure_ascii=False)
                    add_member(tar, f, f"{sample.key}.json", meta.encode("utf-8", "replace"))
    return ShardRef(name=name, path=path, num_samples=len(ranges)), ranges


def read_image(lake: Lake, shard: str, offset: int, size: int) -> bytes:
    """The stored bytes of one image: one range read.

    Raises CorruptShard when the shard is gone or ends before the image does.
    """
    root, path = place_of(lake, shard)
    try:
        data = root.read_range(path, offset, size)
    except FileNotFoundError as err:
        raise CorruptShard(f"shard {root.uri}/{path} is gone; {_remedy(shard)}") from err
    if len(data) != size:
        raise CorruptShard(
            f"shard {root.uri}/{path} ends at byte {offset + len(data)}, an image needs bytes "
            f"{offset} to {offset + size}; {_remedy(shard)}"
        )
    return data


def read_verified_image(lake: Lake, shard: str, offset: int, size: int, image_id: str) -> bytes:
    """`read_image`, and the bytes must be those that `image_id` names, else CorruptShard."""
    data = read_image(lake, shard, offset, size)
    if ids.image_id(data) != image_id:
        root, path = place_of(lake, shard)
        raise CorruptShard(
            f"shard {root.uri}/{path}: bytes {offset} to {offset + size} are not image {image_id}; "
            f"{_remedy(shard)}"
        )
    return data


def iter_shard(lake: Lake, name: str) -> Iterator[Sample]:
    """The samples of a shard in order without the purged ones, one in memory; CorruptShard when the tar breaks off."""
    path = layout.shard(name)
    try:
        with lake.root.open(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            image: tuple[str, str, bytes] | None = None
            for member in tar:
                key, _, ext = member.name.partition(".")
                data = _member_bytes(tar, member)
                if ext != "json":
                    image = (key, ext, data)
                elif not data.strip(b"\0"):  # purged: zeros in the place of both
                    image = None
                elif image is not None and image[0] == key:
                    yield Sample(key=key, image=image[2], ext=image[1], meta=json.loads(data))
                    image = None
    except (tarfile.TarError, EOFError, FileNotFoundError, ValueError) as err:
        raise CorruptShard(
            f"shard {lake.uri}/{path} is not a readable tar ({err}); restore it from a copy, or "
            "run `bootstrap repair` and the ingest stage to fetch its images again"
        ) from err


def add_member(tar: tarfile.TarFile, f: BinaryIO, name: str, data: bytes) -> int:
    """Append a member with fixed header fields; the offset of its first data byte."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = len(data), 0o644, 0, 0, 0
    offset = f.tell() + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset


def _remedy(shard: str) -> str:
    prefix = layout.in_place_set(shard)
    if prefix is not None:
        return (
            "it is a tar of an image set, which the lake only points to: put it back, or, when the set was moved, write "
            f"its new folder as `root` into {layout.image_set_record(prefix)}"
        )
    return "restore it from a copy, or run `bootstrap repair` and the ingest stage to fetch its images again"


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    f = tar.extractfile(member)
    data = f.read() if f is not None else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} breaks off")
    return data
