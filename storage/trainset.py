"""Training sets: the rows of a query, in a fixed order, mapped into memory rather than read.

A row names an image by its byte range, so training reads each picture with one range read.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage import catalog, layout
from storage.errors import ConfigError, CorruptData, EmptyTrainSet, QueryRefused
from storage.fs import explained
from storage.lake import Lake
from storage.tables import file_sha256

BATCH_ROWS = 65_536
"""Rows of a record batch: fixed, so that row i lies in batch i // BATCH_ROWS."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)

ROWS = """
SELECT t.image_id, t.caption, t.source, i.shard, i."offset", i.size
FROM wanted t
JOIN images i USING (image_id)
ORDER BY t.image_id, t.caption, t.source
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSetRef:
    """A training set: its fingerprint is the hash of its rows."""

    name: str
    path: str
    fingerprint: str
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRow:
    """One pair: the text, and where the image lies."""

    image_id: str
    caption: str
    source: str
    shard: str
    offset: int
    size: int


class TrainSet:
    """An opened training set; rows come from a memory map, so it costs no memory to hold.

    Rows are sorted by image_id: those of one image lie side by side.
    """

    def __init__(self, reader: Any, num_rows: int) -> None:
        self._reader = reader
        self._num_rows = num_rows
        self._batches: dict[int, pa.RecordBatch] = {}

    def __len__(self) -> int:
        return self._num_rows

    @property
    def number_type(self) -> type[np.unsignedinteger[Any]]:
        """Smallest type of four bytes or more that holds the number of any row."""
        return np.uint32 if self._num_rows <= 2**32 else np.uint64

    def row(self, i: int) -> TrainRow:
        """Row i, from 0; IndexError beyond the end."""
        if not 0 <= i < self._num_rows:
            raise IndexError(f"row {i} of a training set of {self._num_rows}")
        batch = self._batch(i // BATCH_ROWS)
        values = [column[i % BATCH_ROWS].as_py() for column in batch.columns]
        return TrainRow(**dict(zip(SCHEMA.names, values, strict=True)))

    def values(self, column: str, start: int, end: int) -> list[Any]:
        """A column's values of rows `start` to `end`, the last not included."""
        index, found = SCHEMA.get_field_index(column), []
        while start < end:
            first = start % BATCH_ROWS
            count = min(end - start, BATCH_ROWS - first)
            found += self._batch(start // BATCH_ROWS).column(index).slice(first, count).to_pylist()
            start += count
        return found

    def image_starts(self) -> np.ndarray:
        """(I,) unsigned: the first row of every image, in order; one pass over the ids."""
        starts, last = [], None
        for number, ids in enumerate(self._columns("image_id")):
            changed = np.empty(len(ids), dtype=bool)
            changed[0] = ids[0].as_py() != last
            changed[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
            first_row = number * BATCH_ROWS
            starts.append((np.flatnonzero(changed) + first_row).astype(self.number_type))
            last = ids[-1].as_py()
        return np.concatenate(starts)

    def distinct(self, column: str) -> list[Any]:
        """The different values of a column, sorted as text."""
        found: set[Any] = set()
        for values in self._columns(column):
            found.update(pc.unique(values).to_pylist())
        return sorted(found, key=str)

    def is_one_of(self, column: str, wanted: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether a row's value is one of `wanted`."""
        wanted_values = pa.array(wanted, type=SCHEMA.field(column).type)
        parts = (pc.is_in(values, value_set=wanted_values) for values in self._columns(column))
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])

    def captions(self) -> Iterator[str]:
        """All texts in order, for a tokenizer to learn from."""
        for values in self._columns("caption"):
            yield from values.to_pylist()

    def _columns(self, column: str) -> Iterator[pa.Array]:
        index = SCHEMA.get_field_index(column)
        for number in range(self._reader.num_record_batches):
            yield self._batch(number).column(index)

    def _batch(self, number: int) -> pa.RecordBatch:
        """Views of the map, kept: making them takes longer than reading a row."""
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = self._reader.get_batch(number)
        return batch


def build_trainset(lake: Lake, sql: str, *, name: str, memory_limit: str = "2GB") -> TrainSetRef:
    """Write the training set that a query over the views gives.

    The query gives image_id, caption, source. Raises EmptyTrainSet for no row, ConfigError when it
    names an image that is held out or not stored, QueryRefused when it is not one reading query.
    """
    with catalog.disk_watched(lake, layout.WORK), catalog.connect(lake, memory_limit) as con:
        num_rows = _want(con, sql, name)
        reader = con.sql(ROWS).to_arrow_reader(BATCH_ROWS)
        fingerprint = _put(lake, reader, name)
    path = layout.trainset(fingerprint)
    return TrainSetRef(name=name, path=path, fingerprint=fingerprint, num_rows=num_rows)


def images_in(lake: Lake, fingerprint: str, image_ids: pa.Array) -> dict[str, int]:
    """Which of `image_ids` a stored training set has rows of, and how many."""
    found: dict[str, int] = {}
    with lake.root.open(layout.trainset(fingerprint)) as f:
        reader = pa.ipc.open_file(f)
        for number in range(reader.num_record_batches):
            ids = reader.get_batch(number).column("image_id")
            here = pc.value_counts(ids.filter(pc.is_in(ids, value_set=image_ids)))
            for each in here.to_pylist():
                found[each["values"]] = found.get(each["values"], 0) + each["counts"]
    return found


def drop_images(lake: Lake, fingerprint: str, image_ids: pa.Array, purge_id: str) -> str | None:
    """Replace a stored training set by one without the rows of some images; its fingerprint, None when no row is left.

    The new set is what the same query gives from now on. A record in place of the old one says which it is.
    """
    path = layout.trainset(fingerprint)
    with lake.root.open(path) as f:
        reader = pa.ipc.open_file(f)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        kept = (
            batch.filter(pc.invert(pc.is_in(batch.column("image_id"), value_set=image_ids)))
            for batch in batches
        )
        some = (batch for batch in kept if batch.num_rows)
        first = next(some, None)
        successor = None if first is None else _put(lake, chain([first], some), f"purge-{purge_id}")
    record = {"successor": successor, "purge_id": purge_id}
    lake.root.write_bytes(layout.trainset_successor(fingerprint), json.dumps(record).encode())
    lake.root.remove(path)
    return successor


def standing(lake: Lake, fingerprint: str) -> str | None:
    """The stored training set of that fingerprint, or what is left of it after purges; None when it is gone."""
    known: str | None = fingerprint
    while known is not None and not lake.root.exists(layout.trainset(known)):
        try:
            record = json.loads(lake.root.read_bytes(layout.trainset_successor(known)))
        except FileNotFoundError:
            return None
        known = record["successor"]
    return known


def _put(lake: Lake, batches: Iterator[pa.RecordBatch], name: str) -> str:
    """Write rows as a training set of the lake; its fingerprint."""
    tmp = lake.scratch("trainsets") / f"{name}.arrow"
    with explained(lake.root, str(tmp)), tmp.open("wb") as f:
        with pa.ipc.new_file(f, SCHEMA) as writer:
            for batch in _even(batches):
                writer.write_batch(batch)
    fingerprint = file_sha256(tmp)[:32]
    path = layout.trainset(fingerprint)
    if not lake.root.exists(path):
        lake.root.put_file(tmp, path)
    tmp.unlink()
    return fingerprint


def open_trainset(lake: Lake, ref: TrainSetRef) -> TrainSet:
    """Map a training set into memory; CorruptData when the file is not what was built."""
    local = lake.root.local_path(ref.path)
    if local is None:
        local = lake.scratch("trainsets") / f"{ref.fingerprint}.arrow"
        if not local.exists():
            lake.root.get_file(ref.path, local)
    try:
        if file_sha256(local)[:32] != ref.fingerprint:
            raise CorruptData(
                f"training set {local} is not the one that was built; remove it and run the same "
                "command again"
            )
        return TrainSet(pa.ipc.open_file(pa.memory_map(str(local))), ref.num_rows)
    except FileNotFoundError as err:
        raise CorruptData(
            f"training set {local} is gone; run the same command again to build it"
        ) from err


def _want(con: duckdb.DuckDBPyConnection, sql: str, name: str) -> int:
    """Put the query's rows into `wanted` and check them; how many there are."""
    catalog.checked_statement(con, sql)
    try:
        con.execute(
            "CREATE TEMP TABLE wanted AS SELECT image_id, caption, source "
            f"FROM (\n{sql.strip().rstrip(';')}\n)"
        )
    except duckdb.Error as err:
        raise QueryRefused(f"training set {name}: the query failed: {err}") from err
    checks = con.execute(
        "SELECT count(*), count(*) FILTER (WHERE i.image_id IS NULL), "
        "count(*) FILTER (WHERE i.heldout), count(*) FILTER (WHERE t.caption IS NULL) "
        "FROM wanted t LEFT JOIN images i USING (image_id)"
    ).fetchall()
    rows, absent, heldout, textless = (int(n) for n in checks[0])
    if rows == 0:
        raise EmptyTrainSet(
            f"training set {name} has no row; look at the funnel for where they were lost. "
            f"The query: {' '.join(sql.split())}"
        )
    if heldout or absent or textless:
        raise ConfigError(
            f"training set {name}: of {rows} rows, {heldout} show held-out or canary images, {absent} images "
            f"that are not stored and {textless} have no caption; exclude them in the query, as "
            "the views raw, human and clean do"
        )
    return rows


def _even(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly BATCH_ROWS, the last one smaller."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in batches:
        held.append(batch.cast(SCHEMA))
        num_held += batch.num_rows
        while num_held >= BATCH_ROWS:
            table = pa.Table.from_batches(held).combine_chunks()
            yield table.slice(0, BATCH_ROWS).to_batches()[0]
            held = table.slice(BATCH_ROWS).combine_chunks().to_batches()
            num_held -= BATCH_ROWS
    if num_held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]
