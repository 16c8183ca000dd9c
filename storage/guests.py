"""Guests: web texts of images that lie in another shard, since an earlier row brought the image.

Each stands in the part of its own row. Whoever goes over a few shards at a time needs it with the shard that its image
lies in, its home; so guests are gathered once, in the order of their homes.
"""

import shutil
import tempfile
import threading
import weakref
from pathlib import Path

from storage import catalog
from storage.lake import Lake
from storage.parts_sql import quoted, rows_of
from storage.tables import PartRef

_STANDS = r"regexp_extract(part, '([^/]+)[.]parquet$', 1) AS stands"

_HOMES = """
CREATE TEMP TABLE homes AS
SELECT DISTINCT image_id, stands, shard AS home
FROM (SELECT image_id, shard, {stands} FROM ({pairs}) WHERE pool = 'web' AND status <> 'ok' AND shard IS NOT NULL)
WHERE shard <> stands
"""
_GATHERED = """
COPY (
    SELECT h.home, h.stands, c.caption_id, c.image_id, c.caption, s.itm_prob, s.itc_sim, s.status, s.error, s.round
    FROM (SELECT caption_id, image_id, caption, {stands} FROM ({captions}) WHERE source = 'web' AND status = 'ok') c
    JOIN homes h USING (image_id, stands)
    LEFT JOIN ({scores}) s ON s.caption_id = c.caption_id
    ORDER BY h.home, c.image_id, c.caption_id
) TO {path} (FORMAT parquet)
"""


class Guests:
    """The guests of a round with their scores, in a file that goes with this object."""

    def __init__(self, lake: Lake, shards: dict[str, dict[str, PartRef]]) -> None:
        """`shards` are parts by shard and kind, as `Candidates` has them; nothing is read before it is asked for."""
        self._lake, self._shards = lake, shards
        self._lock = threading.Lock()
        self._is_gathered = False
        self._path: Path | None = None

    def texts_sql(self, shards: list[str]) -> str | None:
        """SQL of (caption_id, image_id, source, caption): guests from elsewhere of images in neighbouring shards.

        None when the round has no guest at all.
        """
        rows = self._rows(shards)
        return rows and f"SELECT caption_id, image_id, 'web' AS source, caption FROM ({rows})"

    def scores_sql(self, shards: list[str]) -> str | None:
        """SQL of their scores: caption_id, itm_prob, itc_sim, status, error and round."""
        rows = self._rows(shards)
        return rows and (
            "SELECT caption_id, itm_prob, itc_sim, status, error, round "
            f"FROM ({rows}) WHERE round IS NOT NULL"
        )

    def _rows(self, shards: list[str]) -> str | None:
        path = self._gathered()
        if path is None:
            return None
        within = f"BETWEEN {quoted(min(shards))} AND {quoted(max(shards))}"
        return (
            f"SELECT * FROM read_parquet({quoted(str(path))}) "
            f"WHERE home {within} AND NOT (stands {within})"
        )

    def _gathered(self) -> Path | None:
        with self._lock:
            if not self._is_gathered:
                self._path = self._gather()
                self._is_gathered = True
            return self._path

    def _gather(self) -> Path | None:
        with catalog.connect_bare(self._lake) as con:
            pairs = rows_of(self._lake, "pairs", self._parts("pairs"), named=True)
            con.execute(_HOMES.format(pairs=pairs, stands=_STANDS))
            stands = {row[0] for row in con.execute("SELECT DISTINCT stands FROM homes").fetchall()}
            if not stands:
                return None
            scratch = None if self._lake.read_only else self._lake.scratch("guests")
            folder = Path(tempfile.mkdtemp(prefix="bootstrap-guests-", dir=scratch))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = folder / "guests.parquet"
            captions = rows_of(self._lake, "captions", self._parts("web", stands), named=True)
            scores = rows_of(self._lake, "scores", self._parts("scores", stands))
            con.execute(
                _GATHERED.format(
                    captions=captions, scores=scores, stands=_STANDS, path=quoted(str(path))
                )
            )
            return path

    def _parts(self, kind: str, shards: set[str] | None = None) -> list[PartRef]:
        names = sorted(self._shards if shards is None else shards)
        return [self._shards[name][kind] for name in names if kind in self._shards[name]]
