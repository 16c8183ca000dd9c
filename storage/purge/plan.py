"""What a purge would take out, found before anything is touched; and the record of its beginning.

Everything that can only be known while the rows are still there is worked out here and written down, so that a purge
which was killed needs nothing but its record to go on.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage import addresses, catalog, layout
from storage.canaries import human_images_input
from storage.catalog import disk_watched
from storage.errors import ConfigError
from storage.lake import Lake
from storage.purge import scratch
from storage.purge.matching import Matches
from storage.purge.models import TrainedOn, trained_on
from storage.purge.parts import WITH_IMAGES, rows_by_part
from storage.purge.request import Request
from storage.tables import list_parts, read_part

ROWS, TEXTS = "rows.parquet", "texts.parquet"

ROWS_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("pool", pa.string()),
        ("key", pa.string()),
        ("row", pa.int64()),
        ("url", pa.string()),
        ("address", pa.string()),
        ("image_id", pa.string()),
        ("status", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("asked", pa.string()),
        ("models", pa.string()),
    ]
)
"""Input rows that are to be purged, in order of their part."""

# Texts that say something of a purged image and nothing of any other: what must not be found anywhere afterwards.
_TEXTS = """
WITH texts AS (
    SELECT alt_text AS text FROM chosen WHERE alt_text IS NOT NULL
    UNION SELECT caption FROM captions WHERE image_id IN (FROM purging) AND caption IS NOT NULL
)
SELECT text FROM texts
WHERE trim(text) <> '' AND text NOT IN (
    SELECT caption FROM captions WHERE image_id NOT IN (FROM purging) AND caption IS NOT NULL)
  AND text NOT IN (
    SELECT alt_text FROM pairs WHERE alt_text IS NOT NULL AND key NOT IN (SELECT key FROM chosen))
ORDER BY text
"""
# Texts of a purged image that were held against other images, as texts that do not belong to them.
_PLANTED = """
SELECT DISTINCT caption_id FROM canaries
WHERE image_id NOT IN (FROM purging)
  AND caption IN (SELECT caption FROM captions WHERE image_id IN (FROM purging) AND source = 'human')
  AND caption NOT IN (SELECT caption FROM captions WHERE image_id NOT IN (FROM purging) AND source = 'human')
ORDER BY caption_id
"""

Hide = Callable[[duckdb.DuckDBPyConnection], None]
"""Let a connection see the lake as it will be: without the images."""

ContentChanges = Callable[[Lake, pa.Array, Hide], Iterable[tuple[str, str, str]]]
"""Fingerprints of rows that stages compute for their bases: (path of a part, before, now), for all parts concerned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A purge before it is done: what it would take out. Small, however many images there are, but for `content`."""

    purge_id: str
    because: str
    begun_at: str
    asked: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    """What was asked for and is nowhere in the lake."""
    num_rows: int = 0
    """Input rows whose outcome becomes `purged`."""
    num_images: int = 0
    shards: Mapping[str, int] = field(default_factory=dict)
    """Images by the shard that holds their bytes."""
    num_bytes: int = 0
    """Of images, in all shards."""
    tables: Mapping[str, int] = field(default_factory=dict)
    """Rows by table that go; of pairs, that become outcomes without text."""
    training_sets: Mapping[str, int] = field(default_factory=dict)
    """Rows that go, by training set."""
    trained: tuple[TrainedOn, ...] = ()
    """Models that were trained on images of the purge."""
    unknown: tuple[str, ...] = ()
    """Models of which that is not known, because their training sets are gone."""
    reports: tuple[int, ...] = ()
    """Rounds whose pages are written anew."""
    scratch: tuple[str, ...] = ()
    """Unfinished work that is thrown away."""
    look_alikes: tuple[tuple[str, str], ...] = ()
    """(image_id, url) of other images with the same difference hash, which stay."""
    planted: tuple[str, ...] = ()
    """Texts of the images that were held against others, by caption_id."""
    content: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By path of a part, fingerprints of what it was made from: before -> from now on."""


@dataclass(kw_only=True)
class Found:
    """What a request means: the plan, and the rows and texts that are too many for it."""

    plan: Plan
    rows: pa.Table
    texts: pa.Table
    image_ids: pa.Array
    already: pa.Table
    """key, url and image_id of rows that are meant and were purged before."""


def find(
    lake: Lake,
    request: Request,
    content_changes: ContentChanges | None = None,
    memory_limit: str = "2GB",
) -> Found:
    """Look for all that a purge concerns; nothing is written.

    Raises ConfigError naming what matches nothing, unless the request is a list of which something matches.
    """
    with disk_watched(lake, layout.WORK), catalog.connect(lake, memory_limit) as con:
        matches = Matches(con, lake, request)
        if matches.unmatched and (
            not request.is_list or len(matches.unmatched) == len(request.asked)
        ):
            raise ConfigError(
                f"nothing in {lake.uri} is {', '.join(map(str, matches.unmatched[:5]))}; an address matches as it was "
                "listed or in another spelling of the same, a host with its subdomains, an image by its id "
                "(`bootstrap why URL` shows it)"
            )
        table = con.sql("SELECT * EXCLUDE (alt_text) FROM chosen ORDER BY part, row, key")
        chosen = table.to_arrow_table()
        texts = con.sql(_TEXTS).to_arrow_table()
        ids = matches.image_ids()
        planted = tuple(row[0] for row in con.execute(_PLANTED).fetchall())
        stored = con.execute(
            "SELECT shard, count(*), sum(size) FROM chosen WHERE shard IS NOT NULL GROUP BY shard ORDER BY shard"
        ).fetchall()
        look_alikes = tuple(matches.look_alikes())
        num_rows, already = matches.num_rows, matches.already
    models = trained_on(lake, ids)
    rows = _rows(chosen, models.by_image())
    by_part = rows_by_part(lake, ids, planted)
    tables = {name: sum(rows.values()) for name, rows in by_part.items()}
    changes: dict[str, dict[str, str]] = {}
    for path, old, new in _changes(lake, ids, content_changes):
        if old != new:
            changes.setdefault(path, {})[old] = new
    plan = Plan(
        purge_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        because=request.because,
        begun_at=datetime.now(UTC).isoformat(timespec="seconds"),
        asked=tuple(map(str, request.asked)),
        unmatched=tuple(map(str, matches.unmatched)),
        num_rows=num_rows,
        num_images=len(ids),
        shards={shard: int(images) for shard, images, _ in stored},
        num_bytes=sum(int(size) for _, _, size in stored),
        tables={"pairs": num_rows} | {name: n for name, n in tables.items() if n},
        training_sets=models.rows,
        trained=models.models,
        unknown=models.unknown,
        reports=_reports(lake) if num_rows else (),
        scratch=tuple(scratch.unfinished(lake)) if num_rows else (),
        look_alikes=look_alikes,
        planted=planted,
        content=changes,
    )
    return Found(plan=plan, rows=rows, texts=texts, image_ids=ids, already=already)


def begin(lake: Lake, found: Found) -> None:
    """Write down what is going to be purged: from here on the purge is to be finished, whatever happens."""
    plan = found.plan
    for name, table in ((ROWS, found.rows), (TEXTS, found.texts)):
        with lake.root.staged(layout.purge_work(plan.purge_id, name)) as tmp:
            pq.write_table(table, tmp, compression="zstd")
    lake.root.write_bytes(layout.PURGE_BEGUN, json.dumps(asdict(plan), indent=1).encode())


def begun(lake: Lake) -> Found | None:
    """The purge that was begun and is not finished, None without one."""
    try:
        record: dict[str, Any] = json.loads(lake.root.read_bytes(layout.PURGE_BEGUN))
    except FileNotFoundError:
        return None
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    fields["trained"] = tuple(TrainedOn(**each) for each in record["trained"])
    fields["look_alikes"] = tuple(tuple(pair) for pair in record["look_alikes"])
    plan = Plan(**fields)
    if lake.root.exists(layout.purge_record(plan.purge_id)):  # finished, and killed just after
        rows, texts = ROWS_SCHEMA.empty_table(), pa.table({"text": pa.array([], pa.string())})
    else:
        rows, texts = (
            _read(lake, layout.purge_work(plan.purge_id, name)) for name in (ROWS, TEXTS)
        )
    return Found(
        plan=plan, rows=rows, texts=texts, image_ids=image_ids_of(rows), already=rows.slice(0, 0)
    )


def image_ids_of(rows: pa.Table) -> pa.Array:
    """The different images of some rows, sorted."""
    ids = rows.column("image_id").combine_chunks().drop_null().unique()
    return ids.take(pc.sort_indices(ids)) if len(ids) else ids


def hiding(image_ids: pa.Array) -> Hide:
    """Let the views of a connection have none of some images."""

    def hide(con: duckdb.DuckDBPyConnection) -> None:
        con.register("hidden", pa.table({"image_id": image_ids}))
        for table in ("pairs", *WITH_IMAGES):
            con.execute(f"ALTER VIEW {table} RENAME TO all_{table}")
            con.execute(
                f"CREATE VIEW {table} AS SELECT * FROM all_{table} "
                "WHERE image_id IS NULL OR image_id NOT IN (SELECT image_id FROM hidden)"
            )

    return hide


def _changes(
    lake: Lake, ids: pa.Array, content_changes: ContentChanges | None
) -> Iterable[tuple[str, str, str]]:
    """What stages of this package compute of rows, then what those of others do."""
    if not len(ids):
        return
    gone = set(ids.to_pylist())
    for ref in list_parts(lake, "canary_draws"):
        drawn = read_part(lake, ref, ["image_id"]).column(0).to_pylist()
        left = [image_id for image_id in drawn if image_id not in gone]
        yield ref.path, human_images_input(drawn), human_images_input(left)
    if content_changes is not None:
        yield from content_changes(lake, ids, hiding(ids))


def _rows(chosen: pa.Table, models: Mapping[str, list[str]]) -> pa.Table:
    """The chosen rows with their addresses in normal form, and the models that were trained on their images."""
    batches = []
    for batch in chosen.to_batches(max_chunksize=10_000):
        normal = [addresses.normal(url) for url in batch.column("url").to_pylist()]
        ids = batch.column("image_id").to_pylist()
        added = {
            "address": pa.array(normal, pa.string()),
            "models": pa.array([json.dumps(models.get(each, [])) for each in ids], pa.string()),
        }
        arrays = [
            added[name] if name in added else batch.column(name) for name in ROWS_SCHEMA.names
        ]
        batches.append(pa.RecordBatch.from_arrays(arrays, ROWS_SCHEMA.names).cast(ROWS_SCHEMA))
    return pa.Table.from_batches(batches, ROWS_SCHEMA)


def _reports(lake: Lake) -> tuple[int, ...]:
    """Rounds that have a page: which pictures and texts are on it nobody wrote down."""
    names = lake.root.list(layout.REPORTS)
    numbers = (int(name.removeprefix("round=")) for name in names if name.startswith("round="))
    return tuple(number for number in numbers if lake.root.exists(layout.report(number)))


def _read(lake: Lake, rel: str) -> pa.Table:
    with lake.root.open(rel) as f:
        return pq.read_table(f)
