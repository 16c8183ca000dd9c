"""Everything known of one image, text or address: where it came from, what was said of it, decided, and trained on."""

import json
import re
from bisect import bisect_left
from pathlib import PurePosixPath
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from storage import catalog, layout, trainset
from storage.errors import ConfigError
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.schemas import OK
from storage.steady import steadily
from storage.tables import committed_part, list_parts

MOST_IMAGES = 20
"""Images that one address may have stood for; more are counted and not shown."""

_ID = re.compile(r"[0-9a-f]{32}")

_PAIRS = """
SELECT pool, source_name, url, alt_text, status, reason, attempts, shard, "offset", size, width, height, image_id,
    fetched_at, licence
FROM pairs WHERE {where} ORDER BY pool, "row"
"""
_TEXTS = """
SELECT caption_id, source, caption, status, round, model_id AS captioner_id, top_p, seed, "index", mean_logprob,
    finish_reason
FROM captions WHERE image_id = $id ORDER BY source DESC, round, "index", caption_id, status <> 'ok'
"""
_SCORES = """
SELECT caption_id, round, model_id AS filter_id, itm_prob, itc_sim, status, error
FROM scores WHERE image_id = $id ORDER BY round, filter_id
"""
_DECISIONS = """
SELECT d.caption_id, d.round, d.policy, d.params, d.generation, d.kept, d.reason,
    a.generation IS NOT NULL AS counts
FROM decisions d LEFT JOIN active_policies a USING (round, generation)
WHERE d.image_id = $id ORDER BY d.round, d.generation
"""
_PURGED = """
SELECT purge_id, because, purged_at, any_value(models) AS models FROM purged
WHERE image_id = $id GROUP BY ALL ORDER BY purged_at
"""
_MODELS = """
SELECT model_id, any_value(role) AS role, min(round) AS round, any_value(trained_on) AS trained_on
FROM models WHERE trained_on IS NOT NULL GROUP BY model_id ORDER BY round, role
"""


def why(lake: Lake, asked: str, memory_limit: str = "2GB") -> dict[str, Any]:
    """What is known of an image_id, a caption_id or an address, as plain data.

    `rows` are the input rows that are meant, `images` the images they gave, each with its texts. Raises
    ConfigError when nothing of that name is in the lake.
    """
    return steadily(lake, lambda: _why(lake, asked, memory_limit))


def _why(lake: Lake, asked: str, memory_limit: str) -> dict[str, Any]:
    with catalog.connect(lake, memory_limit) as con:
        caption_id, rows = None, []
        if by_id := bool(_ID.fullmatch(asked)):
            rows = _ask(con, _PAIRS.format(where="image_id = $id"), asked)
            if not rows and (image_id := _image_of(con, asked)):
                caption_id = asked
                rows = _ask(con, _PAIRS.format(where="image_id = $id"), image_id)
        else:
            rows = _ask(con, _PAIRS.format(where="url = $id"), asked)
        if not rows:
            raise ConfigError(
                f"nothing in {lake.uri} is called {asked!r}: give an image_id or a caption_id (32 hex digits each) or "
                'an address exactly as it was listed; to search, `bootstrap sql "SELECT url, image_id FROM pairs '
                "WHERE url LIKE '%...%' LIMIT 10\"`"
            )
        found = list(dict.fromkeys(row["image_id"] for row in rows if row["image_id"]))
        models = _ask(con, _MODELS, None)
        images = []
        for image_id in found[:MOST_IMAGES]:
            # By its id every row of the image is known already; an address may be one of several.
            all_rows = rows if by_id else _ask(con, _PAIRS.format(where="image_id = $id"), image_id)
            shards = {row["shard"] for row in all_rows if row["status"] == OK}
            if any(row["shard"] and row["status"] != OK for row in all_rows):
                shards |= _parts_with(lake, con, image_id)
            _only_shards(lake, con, shards)
            images.append(_image(lake, con, image_id, caption_id, models))
    return {
        "asked": asked,
        "rows": rows,
        "images": images,
        "images_not_shown": max(0, len(found) - MOST_IMAGES),
    }


def _image(
    lake: Lake,
    con: duckdb.DuckDBPyConnection,
    image_id: str,
    caption_id: str | None,
    models: list[dict[str, Any]],
) -> dict[str, Any]:
    """One image with its texts; of one caption alone when that was asked for."""
    texts = _ask(con, _TEXTS, image_id)
    scores, decisions = _ask(con, _SCORES, image_id), _ask(con, _DECISIONS, image_id)
    trained = [(model, _rows_trained_on(lake, model["trained_on"], image_id)) for model in models]
    for text in texts:
        own = text["caption_id"]
        is_ok = (
            text["status"] == OK
        )  # the same words again have the same id, and no fate of their own
        text["scores"] = _of(scores, own) if is_ok else []
        text["decisions"] = _of(decisions, own) if is_ok else []
        text["trained"] = [
            {name: model[name] for name in ("model_id", "role", "round", "trained_on")}
            for model, rows in trained
            if is_ok and rows is not None and (text["caption"], text["source"]) in rows
        ]
    if caption_id is not None:
        texts = [text for text in texts if text["caption_id"] == caption_id]
    reserved = con.execute(
        "SELECT count(*) FROM reserved WHERE image_id = $id", {"id": image_id}
    ).fetchall()
    return {
        "image_id": image_id,
        "held_back": bool(reserved[0][0]),
        "purged": [
            row | {"models": json.loads(row["models"])} for row in _ask(con, _PURGED, image_id)
        ],
        "texts": texts,
        "models_looked_at": len(models),
        "training_sets_gone": [model["model_id"] for model, rows in trained if rows is None],
    }


def _image_of(con: duckdb.DuckDBPyConnection, caption_id: str) -> str | None:
    rows = con.execute(
        "SELECT image_id FROM captions WHERE caption_id = $id LIMIT 1", {"id": caption_id}
    ).fetchall()
    return str(rows[0][0]) if rows else None


def _parts_with(lake: Lake, con: duckdb.DuckDBPyConnection, image_id: str) -> set[str]:
    """Names of the parts whose rows brought texts of an image, which need not lie in the shard of that name."""
    pairs = rows_of(lake, "pairs", list_parts(lake, "pairs"), named=True)
    found = con.execute(
        f"SELECT DISTINCT part FROM ({pairs}) WHERE image_id = $id AND shard IS NOT NULL",
        {"id": image_id},
    ).fetchall()
    return {PurePosixPath(part).stem for (part,) in found}


def _only_shards(lake: Lake, con: duckdb.DuckDBPyConnection, shards: set[str]) -> None:
    """Let `captions` and `scores` be those of some shards: parts made from a shard share its name."""
    for table in ("captions", "scores"):
        folders = lake.root.list(layout.table_dir(table))
        numbers = [
            int(name.removeprefix("round=")) for name in folders if name.startswith("round=")
        ]
        found = (
            committed_part(lake, table, name, round=n) for n in numbers for name in sorted(shards)
        )
        near = [part for part in found if part is not None]
        con.execute(f"DROP VIEW IF EXISTS temp.{table}")
        if near:
            con.execute(f"CREATE TEMP VIEW {table} AS {rows_of(lake, table, near)}")


def _rows_trained_on(lake: Lake, fingerprint: str, image_id: str) -> set[tuple[str, str]] | None:
    """(caption, source) of an image in a training set, whose rows are sorted by image; None when its file is gone.

    Of a set that images were purged from since, what is left of it.
    """
    stored = trainset.standing(lake, fingerprint)
    if stored is None:
        return None
    try:
        with lake.root.open(layout.trainset(stored)) as f:
            reader = pa.ipc.open_file(f)
            firsts = _Firsts(reader)
            # Rows of one image may begin in the batch before the first that begins with it.
            place = max(0, bisect_left(firsts, image_id) - 1)
            found: set[tuple[str, str]] = set()
            for number in range(place, reader.num_record_batches):
                batch = reader.get_batch(number)
                ids = batch.column("image_id")
                if ids[0].as_py() > image_id:
                    break
                mine = batch.filter(pc.equal(ids, image_id))
                found |= set(
                    zip(
                        mine.column("caption").to_pylist(),
                        mine.column("source").to_pylist(),
                        strict=True,
                    )
                )
            return found
    except FileNotFoundError:
        return None


class _Firsts:
    """The first image_id of each batch, read when asked for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return int(self._reader.num_record_batches)

    def __getitem__(self, number: int) -> str:
        return str(self._reader.get_batch(number).column("image_id")[0].as_py())


def _of(rows: list[dict[str, Any]], caption_id: str) -> list[dict[str, Any]]:
    mine = (row for row in rows if row["caption_id"] == caption_id)
    return [{name: value for name, value in row.items() if name != "caption_id"} for row in mine]


def _ask(con: duckdb.DuckDBPyConnection, sql: str, wanted: str | None) -> list[dict[str, Any]]:
    cursor = con.execute(sql, {"id": wanted} if wanted is not None else None)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
