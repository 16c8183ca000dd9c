"""Which images of the web a lake has: where each lies and which texts it has; on disk, so that memory stays flat.

Built anew by each intake from the committed parts and thrown away with it, so it has no state of its own that could be
lost or out of step.
"""

import sqlite3
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from storage.schemas import OK, PURGED_STATUS

_ID_BYTES = 16
_REFUSED = ("near_duplicate", "eval_overlap")
"""Statuses of pictures that are not stored; the same bytes again in the same list are a duplicate all the same."""

_TABLES = """
CREATE TABLE image (
    id BLOB PRIMARY KEY, key TEXT, shard TEXT, "offset" INTEGER, size INTEGER, texts BLOB
) WITHOUT ROWID;
CREATE TABLE listed (row INTEGER PRIMARY KEY, id BLOB);
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an image lie."""

    shard: str
    offset: int
    size: int


class StoredImages:
    """Images by id, and by the row of the list that is being taken in; use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        """Files go below `folder` and away at the end."""
        self._dir = tempfile.TemporaryDirectory(dir=folder, prefix="_tmp-stored-")
        self._db = sqlite3.connect(Path(self._dir.name) / "stored.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(_TABLES)
        self._db.execute("BEGIN")
        self._coming: dict[str, str] = {}
        """Of the part that is being made: pictures that are new, with the key of their row."""

    def __enter__(self) -> "StoredImages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()
        self._dir.cleanup()

    def first_key(self, image_id: str, key: str) -> str | None:
        """The key of the row that had the picture first; None when this one has, which is remembered."""
        before = self._coming.get(image_id) or self._one("key", image_id)
        if before is None:
            self._coming[image_id] = key
        return before

    def place(self, image_id: str) -> Place | None:
        """Where an image lies; None when it is not stored, or not yet."""
        row = self._db.execute(
            'SELECT shard, "offset", size FROM image WHERE id = ? AND shard IS NOT NULL',
            (bytes.fromhex(image_id),),
        ).fetchone()
        return None if row is None else Place(*row)

    def of_row(self, row: int) -> str | None:
        """The image that a row of the list has; None when it has none."""
        found = self._db.execute("SELECT id FROM listed WHERE row = ?", (row,)).fetchone()
        return None if found is None else bytes(found[0]).hex()

    def texts(self, image_id: str) -> set[str]:
        """Ids of the web captions that an image has."""
        joined = self._one("texts", image_id) or b""
        starts = range(0, len(joined), _ID_BYTES)
        return {joined[start : start + _ID_BYTES].hex() for start in starts}

    def add(
        self, pairs: Iterable[dict[str, Any]], texts: dict[str, list[str]], *, own: bool
    ) -> None:
        """Remember rows of a part of `pairs`, `own` if it is of the list that is being taken in.

        `texts` are ids of captions by image; those of the images that are new with these rows are taken out of it.
        """
        self._coming.clear()
        images, listed = [], []
        for pair in pairs:
            if pair.get("image_id") is None:
                continue
            image_id = bytes.fromhex(pair["image_id"])
            if pair["status"] == OK or (own and pair["status"] in _REFUSED):
                where = (pair.get("shard"), pair.get("offset"), pair.get("size"))
                joined = _joined(texts.pop(pair["image_id"], []))
                images.append((image_id, pair["key"], *where, joined))
            if own and (pair.get("shard") is not None or pair["status"] == PURGED_STATUS):
                listed.append((pair["row"], image_id))
        self._db.executemany("INSERT OR IGNORE INTO image VALUES (?, ?, ?, ?, ?, ?)", images)
        self._db.executemany("INSERT OR IGNORE INTO listed VALUES (?, ?)", listed)

    def add_texts(self, texts: dict[str, list[str]]) -> None:
        """Remember ids of captions, by image, of images that are known."""
        for image_id, found in texts.items():
            # Not by SQL: its || makes a text of bytes.
            joined = (self._one("texts", image_id) or b"") + _joined(found)
            key = bytes.fromhex(image_id)
            self._db.execute("UPDATE image SET texts = ? WHERE id = ?", (joined, key))

    def _one(self, column: str, image_id: str) -> Any:
        """A column of an image; None when it is not there."""
        key = bytes.fromhex(image_id)
        row = self._db.execute(f"SELECT {column} FROM image WHERE id = ?", (key,)).fetchone()
        return None if row is None else row[0]


def _joined(caption_ids: list[str]) -> bytes:
    return b"".join(map(bytes.fromhex, caption_ids))
