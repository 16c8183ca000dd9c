"""What an export holds: the texts that one decision kept, of images that may leave the lake."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import duckdb

from storage import catalog
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.steady import steadily
from storage.tables import PartRef

BATCH_ROWS = 10_000

SELECTED = """
CREATE TABLE selected AS
WITH kept AS (
{kept}
),
withheld AS (
{withheld}
),
wanted AS (
    SELECT
        k.caption_id, k.image_id, k.source, c.caption, c.model_id AS captioner_id,
        s.itm_prob, s.itc_sim
    FROM kept k
    -- Web texts belong to round 0; a synthetic text may be proposed again in a later round.
    JOIN captions c
        ON  c.caption_id = k.caption_id
        AND c.status = 'ok'
        AND c.round = CASE k.source WHEN 'web' THEN 0 ELSE $round END
    LEFT JOIN scores s ON s.caption_id = k.caption_id AND s.round = $round
    -- An image that has left the web pool since takes its texts along.
    WHERE k.image_id IN (SELECT image_id FROM pairs WHERE pool = 'web' AND status = 'ok')
    UNION ALL BY NAME
    SELECT caption_id, image_id, source, caption
    FROM captions
    WHERE $with_human AND source = 'human' AND status = 'ok'
      AND image_id IN (SELECT image_id FROM pairs WHERE pool = 'human' AND status = 'ok')
),
told AS (
    -- What is said of an image: by the web's row where there is one.
    SELECT
        image_id,
        arg_min(
            {{url: url, source_name: source_name, licence: licence, width: width, height: height}},
            (pool <> 'web', key)
        ) AS about
    FROM pairs WHERE status = 'ok' GROUP BY image_id
)
SELECT w.*, unnest(t.about), i.shard, i."offset", i.size
FROM wanted w
JOIN images i USING (image_id)
JOIN told t USING (image_id)
WHERE w.image_id NOT IN (SELECT image_id FROM withheld)
"""

SUMMARY = """
SELECT
    count(DISTINCT image_id), count(*),
    -- Of the rows in any order; no row is there twice, so none cancels another.
    bit_xor(md5_number(CAST(row(
        caption_id, image_id, itm_prob, itc_sim, captioner_id, url, source_name, licence,
        width, height, shard, "offset", size) AS VARCHAR)))
FROM selected
"""

IN_ORDER = """
SELECT * FROM selected
ORDER BY
    shard, "offset", image_id,
    -- People first, then what the filter likes best.
    source <> 'human', coalesce(itm_prob, itc_sim) DESC NULLS LAST, caption_id
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text of an image."""

    caption_id: str
    source: str
    caption: str
    itm_prob: float | None
    itc_sim: float | None
    captioner_id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """One image with its texts, the most trusted first; its bytes are still in the lake."""

    image_id: str
    url: str | None
    source_name: str
    licence: str | None
    width: int | None
    height: int | None
    shard: str
    offset: int
    size: int
    texts: tuple[Text, ...]


def kept_sql(lake: Lake, part: PartRef) -> str:
    """SQL of (caption_id, image_id, source): what one decision keeps, and nothing but web and synthetic."""
    rows = rows_of(lake, "decisions", [part])
    return (
        f"SELECT caption_id, image_id, source FROM ({rows}) "
        "WHERE kept AND source IN ('web', 'synthetic')"
    )


def withheld_sql() -> str:
    """SQL of (image_id): images that no export holds, whatever a policy says of their texts."""
    return f"""
    -- Held out, or kept out of all training to audit filters: once trained on, they measure nothing.
    SELECT image_id FROM reserved
    UNION
    {opted_out_sql()}
    """


def opted_out_sql() -> str:
    """SQL of (image_id): images whose owner has objected since they were taken in.

    An address that was found opted out takes along the image that an earlier intake had from it. What was purged is
    not in the lake any more; should a program that knows of no purges have brought it back, it stays out all the same.
    """
    return """
    SELECT image_id FROM purged WHERE image_id IS NOT NULL
    UNION
    SELECT image_id FROM pairs
    WHERE image_id IS NOT NULL
      AND (status = 'opted_out' OR url IN (SELECT url FROM pairs WHERE status = 'opted_out'))
    """


class Selection:
    """The rows of one export, on disk rather than in memory; make one with `select`."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.con = con
        images, texts, digest = con.execute(SUMMARY).fetchall()[0]
        self.num_images: int = images
        self.num_texts: int = texts
        self.digest = f"{int(digest or 0):032x}"
        """Of every row: another one means that another set would be written."""

    def images(self, start: int = 0) -> Iterator[Picked]:
        """Images with their texts in the order of the lake's shards, from the start-th on."""
        reader = self.con.sql(IN_ORDER).to_arrow_reader(BATCH_ROWS)
        rows = (row for batch in reader for row in batch.to_pylist())
        grouped = groupby(rows, key=lambda row: row["image_id"])
        for number, (_, texts) in enumerate(grouped):
            if number >= start:
                yield _picked(list(texts))

    def counted(self, column: str) -> list[tuple[str | None, int, int]]:
        """(value, images, texts) of a column, most texts first."""
        return self.con.execute(
            f'SELECT "{column}", count(DISTINCT image_id), count(*) FROM selected '
            "GROUP BY ALL ORDER BY 3 DESC, 1 NULLS LAST"
        ).fetchall()


@contextmanager
def select(
    lake: Lake, round: int, part: PartRef, with_human: bool, memory_limit: str = "1GB"
) -> Iterator[Selection]:
    """Find what a decision of a round keeps and may leave the lake."""
    sql = SELECTED.format(kept=kept_sql(lake, part), withheld=withheld_sql())
    about = {"round": round, "with_human": with_human}

    def selected(folder: str) -> duckdb.DuckDBPyConnection:
        con = catalog.connect(lake, memory_limit)
        try:
            con.execute(f"SET temp_directory = '{folder}'")
            return con.execute(sql, about)
        except duckdb.Error:
            con.close()
            raise

    with tempfile.TemporaryDirectory(prefix="bootstrap-") as folder:
        with steadily(lake, lambda: selected(folder)) as con:
            yield Selection(con)


def _picked(rows: list[dict[str, Any]]) -> Picked:
    texts = tuple(Text(**{name: row[name] for name in Text.__slots__}) for row in rows)
    first = rows[0]
    return Picked(
        texts=texts, **{name: first[name] for name in Picked.__slots__ if name != "texts"}
    )
