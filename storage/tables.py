"""Parts of tables: written, committed by their manifest, skipped by fingerprint, read back.

A part is committed exactly when its manifest exists. Whoever makes a part anew removes the
manifest first, so a reader never sees a manifest beside bytes that it does not describe. A purge, which must not let a
part vanish even for a moment, announces the new bytes in the old manifest (`storage.purge.parts`).
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage import layout
from storage.errors import CorruptPart, NotWritable, StaleOutput
from storage.fingerprint import Basis, explain, fingerprint_of
from storage.fs import explained
from storage.lake import Lake
from storage.manifest import Manifest, read_manifest, read_manifests, versions, write_manifest
from storage.schemas import conform, schema_of

logger = logging.getLogger(__name__)

ROW_GROUP_ROWS = 65_536
"""Rows of a row group: fixed, so that the same rows give the same bytes."""

_IDS_DIFFER: dict[str, Any] = {
    "compression_level": 1,
    "use_dictionary": ["source", "round", "policy", "params", "kept", "reason", "generation"],
}
_WRITERS: dict[str, dict[str, Any]] = {
    "decisions": _IDS_DIFFER,
    "variant_decisions": _IDS_DIFFER
    | {"use_dictionary": [*_IDS_DIFFER["use_dictionary"], "variant"]},
}
"""Ids of 32 random hex digits: no dictionary holds them, and the least effort makes them as small as more does."""

_LOOKED_UP: dict[str, tuple[str, ...]] = {
    "pairs": ("image_id", "url"),
    "captions": ("caption_id", "image_id"),
    "scores": ("image_id",),
    "decisions": ("image_id",),
}
"""Columns that one value is looked for in. Ids are random, so least and greatest leave no row group out; a Bloom filter,
about a byte a row, leaves out nearly all."""

OnStale = Literal["error", "rebuild"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRef:
    """A committed part, small enough to hand from task to task."""

    table: str
    name: str
    round: int | None
    path: str
    fingerprint: str
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rows that came in, by outcome: num_in == num_ok + sum(reasons)."""

    num_in: int
    num_ok: int
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """When a stage began and how long its steps took; never part of a fingerprint."""

    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.monotonic)
    """The same by `time.monotonic`: the time of day may jump while a stage runs."""
    timings: Mapping[str, float] = field(default_factory=dict)


def commit_part(
    lake: Lake,
    table: str,
    name: str,
    data: pa.Table,
    *,
    round: int | None = None,
    basis: Basis,
    counts: Counts | None = None,
    clock: Clock | None = None,
) -> PartRef:
    """Write rows of `table` as one part and commit it; an older one of that name is replaced.

    `basis` comes from `fingerprint.basis_of`. Without `counts`, every row counts as ok.
    """
    data = conform(table, data)
    return commit_batches(
        lake,
        table,
        name,
        data.to_batches(),
        round=round,
        basis=basis,
        counts=counts,
        clock=clock,
    )


def commit_batches(
    lake: Lake,
    table: str,
    name: str,
    batches: Iterable[pa.RecordBatch],
    *,
    round: int | None = None,
    basis: Basis,
    counts: Counts | Callable[[], Counts] | None = None,
    clock: Clock | None = None,
) -> PartRef:
    """`commit_part` for a stream: batches of the table's schema, one row group in memory.

    `counts` may be a function: it is asked when all rows are written.
    """
    _writable(lake)
    clock = clock or Clock()
    path = layout.part(table, name, round)
    manifest_path = layout.part_manifest(table, name, round)
    began = time.perf_counter()
    lake.root.remove(manifest_path)
    with lake.root.staged(path) as tmp:
        with explained(lake.root, path):
            num_rows = write_rows(tmp, table, batches)
            num_bytes, sha256 = tmp.stat().st_size, file_sha256(tmp)
    timings = {**clock.timings, "write": round_to_ms(time.perf_counter() - began)}
    if callable(counts):
        counts = counts()
    counts = counts or Counts(num_in=num_rows, num_ok=num_rows)
    manifest = Manifest(
        stage=str(basis["stage"]),
        table=table,
        part=name,
        round=round,
        fingerprint=fingerprint_of(basis),
        basis=basis,
        num_in=counts.num_in,
        num_ok=counts.num_ok,
        num_not_ok=sum(counts.reasons.values()),
        reasons=dict(counts.reasons),
        num_rows=num_rows,
        num_bytes=num_bytes,
        sha256=sha256,
        inputs=tuple(basis["inputs"]),
        versions=versions(),
        started_at=clock.started_at.isoformat(timespec="seconds"),
        seconds=round_to_ms(time.monotonic() - clock.began),
        timings=timings,
    )
    write_manifest(lake.root, manifest_path, manifest)
    logger.info("committed %s: %d rows", path, num_rows)
    return _ref(manifest)


def committed_part(
    lake: Lake,
    table: str,
    name: str,
    *,
    round: int | None = None,
    basis: Basis | None = None,
    on_stale: OnStale = "error",
) -> PartRef | None:
    """The part when it is committed and was made from `basis`; None when it has to be built.

    Made from something else: StaleOutput naming what differs, or None with on_stale="rebuild".
    Without a basis any committed part will do.
    """
    manifest = read_manifest(lake.root, layout.part_manifest(table, name, round))
    if manifest is None:
        return None
    if basis is None or manifest.fingerprint == fingerprint_of(basis):
        return _ref(manifest)
    differs = explain(manifest.basis, basis) or ["a manifest without its basis"]
    if on_stale == "rebuild":
        logger.info("rebuilding %s/%s: %s", table, name, "; ".join(differs))
        return None
    raise StaleOutput(
        f"{layout.part(table, name, round)} was made from something else: {'; '.join(differs)}; "
        "give the old value, or run with --on-stale rebuild to make it anew, or with --new-round "
        "to keep it and start another round"
    )


def list_parts(
    lake: Lake, table: str, round: int | None = None, *, check: bool = False
) -> list[PartRef]:
    """Committed parts sorted by path; without a round, those of every round.

    With `check`, CorruptPart when one does not have its committed size.
    """
    schema_of(table)
    sizes = lake.root.sizes(layout.table_dir(table, round))
    paths = sorted(rel for rel in sizes if rel.endswith(".json"))
    refs = []
    for manifest in read_manifests(lake.root, paths):
        if manifest is not None:
            refs.append(ref := _ref(manifest))
            if check and sizes.get(ref.path) != manifest.num_bytes:
                _check_size(lake, ref, manifest)
    return refs


def part_manifest(lake: Lake, ref: PartRef) -> Manifest:
    """The manifest of a committed part; CorruptPart when it is gone."""
    manifest = read_manifest(lake.root, layout.part_manifest(ref.table, ref.name, ref.round))
    if manifest is None:
        raise CorruptPart(f"part {ref.path} has lost its manifest; {_remedy(ref)}")
    return manifest


def read_part(lake: Lake, ref: PartRef, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole part (it is one shard's worth); CorruptPart when its bytes are not as committed."""
    check_part(lake, ref)
    with _corrupt_named(lake, ref), lake.root.open(ref.path) as f:
        return pq.read_table(f, columns=list(columns) if columns is not None else None)


def iter_part(
    lake: Lake, ref: PartRef, columns: Sequence[str] | None = None, batch_rows: int = ROW_GROUP_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of a part in order, some at a time."""
    check_part(lake, ref)
    with _corrupt_named(lake, ref), lake.root.open(ref.path) as f:
        names = list(columns) if columns is not None else None
        yield from pq.ParquetFile(f).iter_batches(batch_rows, columns=names)


def check_part(lake: Lake, ref: PartRef, full: bool = False) -> None:
    """CorruptPart unless the file has the committed size (and, when `full`, the sha256)."""
    manifest = part_manifest(lake, ref)
    _check_size(lake, ref, manifest)
    if full and not _describes(lake, ref, manifest, "sha256", _stored_sha256(lake, ref.path)):
        raise CorruptPart(
            f"part {lake.uri}/{ref.path} has other bytes than were committed; {_remedy(ref)}"
        )


def drop_part(lake: Lake, ref: PartRef) -> None:
    """Remove a part, its manifest first; the stage that made it makes it again when run."""
    _writable(lake)
    lake.root.remove(layout.part_manifest(ref.table, ref.name, ref.round))
    lake.root.remove(ref.path)


def rows_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `table` as Arrow (keep it to a shard's worth); absent columns become null."""
    return pa.Table.from_pylist(rows, schema=schema_of(table))


def file_sha256(path: Path) -> str:
    """sha256 of a local file, 64 hex digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def round_to_ms(seconds: float) -> float:
    """Seconds to the millisecond, as records hold them."""
    return float(f"{seconds:.3f}")


def write_rows(path: Path, table: str, batches: Iterable[pa.RecordBatch]) -> int:
    """Write rows of `table` as the Parquet file of a part; the number of rows.

    Row groups of ROW_GROUP_ROWS, whatever the batches' sizes, so that the same rows give the same bytes.
    """
    schema = schema_of(table)
    groups = _row_groups(schema, batches)
    first = next(groups)
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 3}
    options |= _WRITERS.get(table, {})
    filters = {
        name: {"ndv": max(first.num_rows, 1), "fpp": 0.01} for name in _LOOKED_UP.get(table, ())
    }
    num_rows = 0
    with pq.ParquetWriter(path, schema, bloom_filter_options=filters or None, **options) as writer:
        for group in chain([first], groups):
            writer.write_table(group.cast(schema), ROW_GROUP_ROWS)
            num_rows += group.num_rows
    return num_rows


def _row_groups(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The rows of all batches in tables of ROW_GROUP_ROWS, the last one smaller; an empty one for no rows."""
    held, pending, is_empty = 0, [], True
    for batch in batches:
        pending.append(batch)
        held += batch.num_rows
        while held >= ROW_GROUP_ROWS:
            rows = pa.Table.from_batches(pending).combine_chunks()
            yield rows.slice(0, ROW_GROUP_ROWS)
            is_empty = False
            pending = rows.slice(ROW_GROUP_ROWS).to_batches()
            held -= ROW_GROUP_ROWS
    if held or is_empty:
        rest = pa.Table.from_batches(pending) if pending else schema.empty_table()
        yield rest.combine_chunks()


def _check_size(lake: Lake, ref: PartRef, manifest: Manifest) -> None:
    try:
        size = lake.root.size(ref.path)
    except FileNotFoundError as err:
        raise CorruptPart(f"part {lake.uri}/{ref.path} is gone; {_remedy(ref)}") from err
    if not _describes(lake, ref, manifest, "num_bytes", size):
        raise CorruptPart(
            f"part {lake.uri}/{ref.path} has {size} bytes, its manifest says "
            f"{manifest.num_bytes}; {_remedy(ref)}"
        )


def _describes(
    lake: Lake, ref: PartRef, manifest: Manifest, name: Literal["num_bytes", "sha256"], found: Any
) -> bool:
    """Whether a manifest, or the one that has taken its place meanwhile, tells of a file's size or hash."""
    if found in (getattr(manifest, name), manifest.coming.get(name)):
        return True
    now = read_manifest(lake.root, layout.part_manifest(ref.table, ref.name, ref.round))
    return now is not None and found in (getattr(now, name), now.coming.get(name))


class _corrupt_named:
    """Turn a reader's complaint about a part's bytes into CorruptPart."""

    def __init__(self, lake: Lake, ref: PartRef) -> None:
        self.lake, self.ref = lake, ref

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: BaseException | None, trace: Any) -> None:
        if isinstance(err, pa.ArrowException | OSError):
            raise CorruptPart(
                f"part {self.lake.uri}/{self.ref.path} is not readable ({err}); {_remedy(self.ref)}"
            ) from err


def _stored_sha256(lake: Lake, rel: str) -> str:
    digest = hashlib.sha256()
    with lake.root.open(rel) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remedy(ref: PartRef) -> str:
    return (
        "run `bootstrap repair` to drop it, then the same command again to make it anew "
        f"(stage output {PurePosixPath(ref.path).parent})"
    )


def _writable(lake: Lake) -> None:
    if lake.read_only:
        raise NotWritable(f"lake {lake.uri} was opened read-only; open it for writing")


def _ref(manifest: Manifest) -> PartRef:
    return PartRef(
        table=manifest.table,
        name=manifest.part,
        round=manifest.round,
        path=layout.part(manifest.table, manifest.part, manifest.round),
        fingerprint=manifest.fingerprint,
        num_rows=manifest.num_rows,
    )
