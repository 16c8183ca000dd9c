"""Which images are in the lake already: on disk, so that memory stays flat.

Built anew by each intake from the committed parts and thrown away with it, so it has no state of
its own that could be lost or out of step.
"""

import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType


class SeenImages:
    """A set of image ids that remembers where each was seen first."""

    def __init__(self, folder: Path) -> None:
        self._dir = tempfile.TemporaryDirectory(dir=folder, prefix="_tmp-seen-")
        self._db = sqlite3.connect(Path(self._dir.name) / "seen.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> "SeenImages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()
        self._dir.cleanup()

    def add(self, image_id: str, place: str) -> str | None:
        """Remember an image; where it was seen before, or None when it is new."""
        before = self.place(image_id)
        if before is None:
            self._db.execute("INSERT INTO seen VALUES (?, ?)", (bytes.fromhex(image_id), place))
        return before

    def place(self, image_id: str) -> str | None:
        """Where an image was seen first, None when it was not."""
        key = bytes.fromhex(image_id)
        row = self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def add_all(self, image_ids: Iterable[str], place: str) -> None:
        """Remember many images, keeping the first place of those known."""
        rows = ((bytes.fromhex(i), place) for i in image_ids)
        self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)
