"""A lake with made-up rows to ask: as many scored captions as wanted, one part a shard, no picture behind them."""

from pathlib import Path

import duckdb
import pyarrow as pa

from storage import Lake, basis_of, commit_part, layout, rounds
from storage.schemas import schema_of

BASIS = basis_of("made", 1, {}, [])

IMAGES = """
CREATE OR REPLACE TEMP TABLE image AS
SELECT i AS "row", md5('image ' || i) AS image_id,
    ['shop', 'blog', 'museum', 'news', 'forum'][CAST(1 + hash(i) % 5 AS BIGINT)] AS source_name
FROM range($first, $first + $images) t(i)
"""
PAIRS = """
SELECT md5('key ' || "row") AS key, 'web' AS pool, "row", source_name,
    'https://' || source_name || '.example/pictures/' || "row" || '.jpg' AS url,
    'a made-up text number ' || "row" AS alt_text, 'ok' AS status, 1 AS attempts, $shard AS shard,
    512 * ("row" - $first) AS "offset", 20000 + hash("row") % 60000 AS size, 320 AS width, 240 AS height,
    image_id, left(md5('phash ' || "row"), 16) AS phash
FROM image
"""
TEXTS = """
SELECT md5($source || image_id) AS caption_id, image_id, $source AS source,
    CASE $source WHEN 'web' THEN 'a made-up text number ' || "row" || ' from ' || source_name
        ELSE 'a picture of thing ' || hash("row") % 1000 || ' beside thing ' || hash("row", 1) % 1000 END AS caption,
    CASE $source WHEN 'synthetic' THEN 'captioner' END AS model_id,
    CASE $source WHEN 'synthetic' THEN 0 END AS "index",
    CASE $source WHEN 'synthetic' THEN (hash(image_id) % 100) / -50.0 END AS mean_logprob,
    'ok' AS status, CAST($round AS INTEGER) AS round
FROM image
"""
# Two humps, as a filter's probabilities have: most texts are clearly one or the other; 1 in 1,000 failed.
SCORES = """
WITH texts AS (
    SELECT image_id, "row", s AS source, md5(s || image_id) AS caption_id
    FROM image, (VALUES ('web'), ('synthetic')) AS t(s)
), drawn AS (
    SELECT *, hash(caption_id) % 1000003 / 1000003.0 AS u, hash(caption_id, 1) % 1000 AS fate
    FROM texts
)
SELECT caption_id, image_id, 'filter' AS model_id,
    CASE WHEN fate > 0 THEN least(1, greatest(0, CASE source
        WHEN 'web' THEN CASE WHEN fate < 420 THEN u * u * u ELSE 1 - u * u * u * u END
        ELSE CASE WHEN fate < 150 THEN u * u ELSE 1 - u * u * u END END)) END AS itm_prob,
    CASE WHEN fate > 0 THEN u * 0.5 - 0.05 END AS itc_sim,
    CASE WHEN fate > 0 THEN 'ok' ELSE 'decode_error' END AS status,
    CASE WHEN fate = 0 THEN 'cannot decode the picture' END AS error,
    CAST(1 AS INTEGER) AS round
FROM drawn ORDER BY "row", source DESC
"""


def make(folder: Path, *, captions: int, parts: int) -> Lake:
    """Commit round 1 of a lake: `captions` texts, half web and half synthetic, all scored."""
    lake = Lake.open(str(folder), create=True)
    rounds.begin_round(lake, 1, {})
    per_part = captions // 2 // parts
    with duckdb.connect(config={"memory_limit": "1GB"}) as con:
        for number in range(parts):
            name = layout.part_name(layout.web_shards(1, 0), number)
            at = {"first": number * per_part, "images": per_part}
            con.execute(IMAGES, at)
            _commit(lake, con, "pairs", name, None, PAIRS, {"shard": name, "first": at["first"]})
            for source, round in (("web", 0), ("synthetic", 1)):
                given = {"source": source, "round": round}
                _commit(lake, con, "captions", name, round, TEXTS, given)
            _commit(lake, con, "scores", name, 1, SCORES, {})
    return lake


def _commit(
    lake: Lake,
    con: duckdb.DuckDBPyConnection,
    table: str,
    name: str,
    round: int | None,
    sql: str,
    given: dict[str, object],
) -> None:
    made = con.sql(sql, params=given or None).to_arrow_table()
    have = set(made.column_names)
    columns = [
        made.column(f.name).cast(f.type) if f.name in have else pa.nulls(made.num_rows, f.type)
        for f in schema_of(table)
    ]
    rows = pa.table(columns, schema=schema_of(table))
    commit_part(lake, table, name, rows, round=round, basis=BASIS)
