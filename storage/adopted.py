"""Image sets of the user's, and shards that are tars of his: the lake points to them and never writes them."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from storage import layout
from storage.errors import CorruptShard
from storage.fs import Root
from storage.lake import Lake


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFile:
    """A file of an image set, or some rows of it: what one shard is made of."""

    path: str
    """Relative to the root of the set; "" for rows of a listing."""
    size: int
    """Bytes of the whole file."""
    first: int = 0
    last: int | None = None
    """Rows first to last - 1; None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSetRecord:
    """An image set as it was taken in."""

    name: str
    format: str
    root: str
    """Its folder. Where the set was moved to, when it was moved: the lake reads it from here."""
    files: tuple[SetFile, ...]
    """By the number of the shard."""


def write_record(lake: Lake, prefix: str, record: ImageSetRecord) -> None:
    """Write where the files of a set lie."""
    data = json.dumps(asdict(record), indent=1).encode()
    lake.root.write_bytes(layout.image_set_record(prefix), data)
    _record.cache_clear()


def read_record(lake: Lake, prefix: str) -> ImageSetRecord:
    """Where the files of a set lie; CorruptShard when nothing tells."""
    path = layout.image_set_record(prefix)
    try:
        content = json.loads(lake.root.read_bytes(path))
        content["files"] = tuple(SetFile(**each) for each in content["files"])
        return ImageSetRecord(**content)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as err:
        raise CorruptShard(
            f"{lake.uri}/{path} does not tell where the tars of an image set lie ({err!r}); restore it from a copy, or "
            "run `bootstrap repair` and the ingest stage to take the set in again"
        ) from err


def place_of(lake: Lake, shard: str) -> tuple[Root, str]:
    """The root and the path of the tar that is a shard: in the lake, or where the user has it."""
    prefix = layout.in_place_set(shard)
    if prefix is None:
        return lake.root, layout.shard(shard)
    root, paths = _record(lake, prefix)
    return root, paths[int(shard.rpartition("-")[2])]


@lru_cache(maxsize=64)
def _record(lake: Lake, prefix: str) -> tuple[Root, list[str]]:
    record = read_record(lake, prefix)
    return Root(record.root, what="image set"), [file.path for file in record.files]
