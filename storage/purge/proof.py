"""The proof of a purge: everything that could still hold an image, read back.

Shards by byte range, tables by SQL, training sets row by row, all other files of the lake by the ids, addresses and texts
in them.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import catalog, layout
from storage.adopted import place_of
from storage.lake import Lake
from storage.parts_sql import rows_of
from storage.purge import scratch
from storage.purge.models import stored_sets
from storage.purge.plan import image_ids_of
from storage.purge.tars import Place, is_blank, members
from storage.schemas import PURGED_STATUS, TABLES
from storage.tables import list_parts
from storage.trainset import images_in

_HEX = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_URL = re.compile(rb"https?://[^\s\"'<>\\]+")
_NODE = re.compile(r">([^<>]+)<")
_HOLD_TEXTS = ("caption", "alt_text", "url")
"""Columns whose texts come from outside; in others a word of this program may be somebody's alt text."""
_FEWEST_WORDS = 3
"""Shorter texts are not looked for in pages and records, whose own words they may be."""
_QUOTES = " \t\r\n\"'“”‘’«»"


@dataclass(kw_only=True)
class Proof:
    """What was looked for, and what of it was found. Clean when nothing was."""

    num_images: int
    num_rows: int
    num_texts: int | None
    """Texts that were looked for; None when they are not known any more."""
    places: int = 0
    """Byte ranges of images in shards that were read back."""
    shards: int = 0
    shards_gone: list[str] = field(default_factory=list)
    """Shards that are not there at all."""
    in_place: list[str] = field(default_factory=list)
    """Byte ranges in tars of image sets, which the lake only points to: for their owner to take out."""
    parts: int = 0
    """Parts of tables that were read."""
    training_sets: int = 0
    files: int = 0
    """Other files that were read."""
    not_blank: list[str] = field(default_factory=list)
    """Byte ranges that are not zeros."""
    rows_left: dict[str, int] = field(default_factory=dict)
    """Rows by table that name an image, an address or a text."""
    sets_left: dict[str, int] = field(default_factory=dict)
    """Rows by training set."""
    files_left: list[str] = field(default_factory=list)
    """Files that name an image, an address or a text, and which."""
    work_left: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (
            self.not_blank or self.rows_left or self.sets_left or self.files_left or self.work_left
        )

    def findings(self) -> list[str]:
        """What was found, in words."""
        found = [f"{place} is not zeros" for place in self.not_blank]
        found += [f"{rows} rows of {table} are left" for table, rows in self.rows_left.items()]
        found += [
            f"{rows} rows of training set {name} are left" for name, rows in self.sets_left.items()
        ]
        return found + self.files_left + [f"work/{name} is left" for name in self.work_left]


def prove(
    lake: Lake, rows: pa.Table, texts: Iterable[str] | None, *, with_scratch: bool = True
) -> Proof:
    """Look for what some purged rows had, everywhere in the lake.

    `rows` have the columns of the table `purged`; `texts` are those that only their images had.
    """
    ids = image_ids_of(rows)
    known_texts = None if texts is None else set(texts)
    proof = Proof(
        num_images=len(ids),
        num_rows=len(rows),
        num_texts=None if known_texts is None else len(known_texts),
    )
    # Names of files that people captioned are no addresses: other sets may have the same.
    web = rows.filter(pc.equal(rows.column("pool"), "web")).column("url")
    urls = set(web.drop_null().unique().to_pylist())
    _look_into_shards(lake, rows, proof)
    _look_into_tables(lake, ids, urls, known_texts or set(), proof)
    for fingerprint in stored_sets(lake):
        proof.training_sets += 1
        if len(ids) and (found := images_in(lake, fingerprint, ids)):
            proof.sets_left[fingerprint] = sum(found.values())
    _look_into_files(lake, set(ids.to_pylist()), urls, known_texts or set(), proof)
    if with_scratch:
        proof.work_left = scratch.unfinished(lake)
    return proof


def places_by_shard(rows: pa.Table) -> Iterator[tuple[str, list[Place]]]:
    """Where the images of some rows lay, shard by shard."""
    stored = rows.filter(pc.is_valid(rows.column("shard"))).sort_by("shard")
    places = _records(stored.select(["shard", "offset", "size"]))
    for shard, group in groupby(places, key=lambda row: str(row["shard"])):
        yield shard, sorted({(row["offset"], row["size"]) for row in group})


def images_of(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Image by image (rows of which none came last): its rows, where it lay, the models that were trained on it."""
    columns = ["pool", "key", "url", "image_id", "shard", "offset", "size", "asked", "models"]
    records = _records(rows.select(columns).sort_by("image_id"))
    for image_id, group in groupby(records, key=lambda row: row["image_id"]):
        of_image = list(group)
        yield {
            "image_id": image_id,
            "rows": [{n: row[n] for n in ("pool", "key", "url", "asked")} for row in of_image],
            "places": [
                {n: row[n] for n in ("shard", "offset", "size")}
                for row in of_image
                if row["shard"] is not None
            ],
            "models": json.loads(of_image[0]["models"] or "[]"),
        }


def _records(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


def _look_into_shards(lake: Lake, rows: pa.Table, proof: Proof) -> None:
    for shard, images in places_by_shard(rows):
        if layout.in_place_set(shard) is not None:
            root, tar = place_of(lake, shard)
            proof.in_place += [f"{root.uri}/{tar}, {size} bytes from {at}" for at, size in images]
            continue
        path = layout.shard(shard)
        if not lake.root.exists(path):
            proof.shards_gone.append(shard)
            continue
        proof.shards += 1
        with lake.root.open(path) as f:
            for place in members(f, images):
                proof.places += 1
                if not is_blank(f, [place]):
                    proof.not_blank.append(f"{path}, {place[1]} bytes from {place[0]},")


def _look_into_tables(
    lake: Lake, ids: pa.Array, urls: set[str], texts: set[str], proof: Proof
) -> None:
    """No column says an id, and none that holds texts says an address or a text.

    But for the rows that are there to say what was purged: those of `purged`, and the outcomes in `pairs`, which have their
    address and their image, and nothing that was said of it.
    """
    said = pa.array(sorted(urls | texts), pa.string())
    with catalog.connect_bare(lake) as con:
        con.register("ids", pa.table({"name": ids.cast(pa.string())}))
        con.register("said", pa.table({"name": said}))
        for table, schema in TABLES.items():
            parts = list_parts(lake, table)
            proof.parts += len(parts)
            if table == "purged" or not parts:
                continue
            columns = [each.name for each in schema if pa.types.is_string(each.type)]
            tests = [f'"{name}" IN (SELECT name FROM ids)' for name in columns]
            tests += [
                f'"{name}" IN (SELECT name FROM said)' for name in columns if name in _HOLD_TEXTS
            ]
            where = " OR ".join(tests)
            if table == "pairs":
                is_purged = f"status = '{PURGED_STATUS}'"
                where = (
                    f"(({where}) AND NOT {is_purged}) "
                    f"OR ({is_purged} AND (alt_text IS NOT NULL OR shard IS NOT NULL))"
                )
            sql = f"SELECT count(*) FROM ({rows_of(lake, table, parts)}) WHERE {where}"
            rows = con.execute(sql).fetchall()[0][0]
            if rows:
                proof.rows_left[table] = int(rows)


def _look_into_files(
    lake: Lake, ids: set[str], urls: set[str], texts: set[str], proof: Proof
) -> None:
    long_texts = {text for text in texts if len(text.split()) >= _FEWEST_WORDS}
    for rel in lake.root.list_recursive(""):
        if not _is_searched(rel):
            continue
        proof.files += 1
        try:
            data = lake.root.read_bytes(rel)
        except FileNotFoundError:
            continue  # a reader's, gone meanwhile
        said = {match.decode() for match in _HEX.findall(data)} & ids
        found = (html.unescape(match.decode("utf-8", "replace")) for match in _URL.findall(data))
        said |= {each.rstrip(".,;)") for each in found} & urls
        said |= _texts_of(rel, data) & long_texts
        proof.files_left += [f"{rel} says {each!r}" for each in sorted(said)]


def _is_searched(rel: str) -> bool:
    """All files but those that are read in another way, weights, and the records of purges themselves."""
    first, path = rel.partition("/")[0], PurePosixPath(rel)
    if first in (layout.SHARDS, layout.PURGES, layout.WORK, layout.LOCK):
        return False
    if first == layout.MODELS:
        return path.name == "lineage.json"
    return path.suffix not in (".parquet", ".arrow")


def _texts_of(rel: str, data: bytes) -> set[str]:
    """The texts that a page shows, or a JSON file has."""
    if rel.endswith(".html"):
        nodes = _NODE.findall(data.decode("utf-8", "replace"))
        return {html.unescape(node).strip(_QUOTES) for node in nodes}
    if rel.endswith(".json"):
        try:
            return set(_strings(json.loads(data)))
        except ValueError:
            return set()
    return set()


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
