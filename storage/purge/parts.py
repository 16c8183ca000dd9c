"""Parts of tables without what was purged: their rows, their counts, and the bases that later runs look for.

A part is replaced so that no reader ever misses it. First the old manifest announces the new bytes, then the file takes
the place of the old one, then the new manifest does; each of the three is one move, and after each of them what lies
there is a part that readers take. Killed between two, the next call goes on.

A stage finds its part again by a fingerprint of what went into it, and that has become less. So the basis of a part is
brought to what its stage computes from now on, and the fingerprint that it was known by is kept in the manifest.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import catalog, layout
from storage.fingerprint import fingerprint_of
from storage.fs import explained
from storage.lake import Lake
from storage.manifest import Manifest, write_manifest
from storage.parts_sql import rows_of
from storage.policy_file import JUDGES_NUMBERS
from storage.schemas import OK, PURGED_STATUS, TABLES, conform
from storage.tables import PartRef, file_sha256, iter_part, list_parts, part_manifest, write_rows

WITH_IMAGES = tuple(
    name
    for name, schema in TABLES.items()
    if "image_id" in schema.names and name not in ("pairs", "purged")
)
"""Tables whose rows of an image go; rows of `pairs` stay, as outcomes."""

_SORTED_INPUTS = ("decide", "audit", "collapse", "gate")
"""Stages that sort the fingerprints of their inputs."""
_KEPT = ("key", "pool", "row", "source_name", "url", "attempts", "image_id", "fetched_at")
"""Of a purged row of `pairs`: what is needed to have one outcome for it and never to take it in again."""

Edit = Callable[[pa.RecordBatch], tuple[pa.RecordBatch, Counter[str]]]
"""A batch as it shall be, and the rows that are purged in it by what they had come to: ok, or a status."""


def rows_by_part(
    lake: Lake, image_ids: pa.Array, planted: Iterable[str] = ()
) -> dict[str, dict[str, int]]:
    """By table, rows of some images by the path of their part; of `canaries` also those of texts in `planted`."""
    found: dict[str, dict[str, int]] = {}
    with catalog.connect_bare(lake) as con:
        con.register("wanted", pa.table({"image_id": image_ids}))
        con.register("planted", pa.table({"caption_id": pa.array(list(planted), pa.string())}))
        for table in WITH_IMAGES:
            parts = list_parts(lake, table)
            texts = "OR caption_id IN (FROM planted)" if table == "canaries" else ""
            rows = con.execute(
                f"SELECT part, count(*) FROM ({rows_of(lake, table, parts, named=True)}) "
                f"WHERE image_id IN (FROM wanted) {texts} GROUP BY part ORDER BY part"
            ).fetchall()
            found[table] = {str(path): int(number) for path, number in rows}
    return found


def without_images(image_ids: pa.Array, planted: Iterable[str] = ()) -> Edit:
    """Leave out the rows of some images, and those of texts in `planted`."""
    texts = pa.array(list(planted), pa.string())

    def edit(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Counter[str]]:
        gone = pc.is_in(batch.column("image_id"), value_set=image_ids)
        if len(texts) and "caption_id" in batch.schema.names:
            gone = pc.or_(gone, pc.is_in(batch.column("caption_id"), value_set=texts))
        return batch.filter(pc.invert(gone)), _outcomes(batch.filter(gone))

    return edit


def with_outcome(keys: pa.Array, because: str) -> Edit:
    """Leave of some rows of `pairs` what identifies them, with the status `purged` and the reason."""

    def edit(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Counter[str]]:
        gone = pc.and_(
            pc.is_in(batch.column("key"), value_set=keys),
            pc.not_equal(batch.column("status"), PURGED_STATUS),
        )
        said = {"status": PURGED_STATUS, "reason": because}
        columns = []
        for field in batch.schema:
            column = batch.column(field.name)
            if field.name not in _KEPT:
                value = pa.scalar(said.get(field.name), field.type)
                column = pc.if_else(gone, value, column)
            columns.append(column)
        edited = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
        return edited, _outcomes(batch.filter(gone))

    return edit


def edit_part(lake: Lake, ref: PartRef, edit: Edit) -> None:
    """Replace the rows of a part, some of which are to be purged, by what `edit` makes of them."""
    before = settle(lake, ref)
    purged: Counter[str] = Counter()

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in iter_part(lake, ref):
            edited, outcomes = edit(_conformed(ref.table, batch))
            purged.update(outcomes)
            yield edited

    with explained(lake.root, ref.path), lake.root.staged(ref.path) as tmp:
        num_rows = write_rows(tmp, ref.table, batches())
        after = replace(
            before,
            **_counts(before, purged),
            num_rows=num_rows,
            num_bytes=tmp.stat().st_size,
            sha256=file_sha256(tmp),
            purged={**before.purged, "rows": before.purged.get("rows", 0) + purged.total()},
        )
        write_manifest(lake.root, _manifest_path(ref), replace(before, coming=_record(after)))
    write_manifest(lake.root, _manifest_path(ref), after)


def settle(lake: Lake, ref: PartRef) -> Manifest:
    """The manifest of a part; one that was being replaced by a process that was killed becomes what its file is."""
    manifest = part_manifest(lake, ref)
    if not manifest.coming:
        return manifest
    coming = Manifest(**{**manifest.coming, "inputs": tuple(manifest.coming["inputs"])})
    settled = coming if _sha256(lake, ref.path) == coming.sha256 else replace(manifest, coming={})
    write_manifest(lake.root, _manifest_path(ref), settled)
    return settled


def settle_all(lake: Lake) -> None:
    """`settle` every part of the lake."""
    for table in TABLES:
        for ref in list_parts(lake, table):
            settle(lake, ref)


def rebase(
    lake: Lake, content: Mapping[str, Mapping[str, str]], trainsets: Mapping[str, str]
) -> None:
    """Bring every basis to what its stage computes from now on.

    `content`: by path of a part, fingerprints of rows that went into it, before -> now. `trainsets`: the same of
    training sets. Parts that were made of changed parts follow, until nothing changes.
    """
    while _rebase_once(lake, content, trainsets):
        continue


def _rebase_once(
    lake: Lake, content: Mapping[str, Mapping[str, str]], trainsets: Mapping[str, str]
) -> bool:
    parts = [
        (ref, part_manifest(lake, ref))
        for table in TABLES
        # A model goes on saying what it was trained on.
        if table not in ("models", "purged")
        for ref in list_parts(lake, table)
    ]
    known: dict[str, dict[int | None, str]] = {}
    for ref, manifest in parts:
        for old in manifest.purged.get("was", ()):
            known.setdefault(old, {})[ref.round] = manifest.fingerprint
    judged = Counter(ref.round for ref, _ in parts if ref.table == "judgements")
    changed = False
    for ref, manifest in parts:
        now = dict(trainsets)
        for old, by_round in known.items():
            now[old] = by_round.get(ref.round) or next(iter(by_round.values()))
        now |= content.get(ref.path, {})
        basis = _translated(manifest.basis, now)
        if basis == manifest.basis:
            continue
        basis["inputs"] = _in_order(basis, judged[ref.round])
        after = replace(
            manifest,
            basis=basis,
            fingerprint=fingerprint_of(basis),
            inputs=tuple(basis["inputs"]),
            purged={
                **manifest.purged,
                "was": [*manifest.purged.get("was", ()), manifest.fingerprint],
            },
        )
        write_manifest(lake.root, _manifest_path(ref), after)
        changed = True
    return changed


def _translated(value: Any, now: Mapping[str, str]) -> Any:
    """A basis with the fingerprints in it that have become others."""
    if isinstance(value, str):
        return now.get(value, value)
    if isinstance(value, Mapping):
        return {name: _translated(item, now) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_translated(item, now) for item in value]
    return value


def _in_order(basis: Mapping[str, Any], num_judged: int) -> list[str]:
    """Inputs as their stage lists them: for a policy that asks the judge, what it said comes after the texts."""
    inputs: list[str] = basis["inputs"]
    if basis["stage"] not in _SORTED_INPUTS:
        return inputs
    params = basis["config"].get("params") if basis["stage"] == "decide" else None
    asks_judge = bool(set(JUDGES_NUMBERS) & {str(value) for value in (params or {}).values()})
    place = len(inputs) - (num_judged if asks_judge else 0)
    return sorted(inputs[:place]) + inputs[place:]


def _outcomes(rows: pa.RecordBatch) -> Counter[str]:
    """Rows by what they had come to, in the words of manifests."""
    names = rows.schema.names
    if "status" in names:
        values = rows.column("status")
    elif "kept" in names:
        values = pc.if_else(rows.column("kept"), OK, "dropped")
    else:
        return Counter({OK: rows.num_rows})
    return Counter({each["values"]: each["counts"] for each in pc.value_counts(values).to_pylist()})


def _counts(before: Manifest, purged: Counter[str]) -> dict[str, Any]:
    """Counts of a manifest when some rows are purged: as many came in, fewer are ok, and the difference has a name."""
    reasons = dict(before.reasons)
    num_ok = before.num_ok
    for status, rows in purged.items():
        told = min(reasons.get(status, 0), rows)
        num_ok -= rows - told
        if told:
            reasons[status] -= told
            if not reasons[status]:
                del reasons[status]
    reasons[PURGED_STATUS] = reasons.get(PURGED_STATUS, 0) + purged.total()
    return {
        "num_ok": num_ok,
        "num_not_ok": sum(reasons.values()),
        "reasons": dict(sorted(reasons.items())),
    }


def _conformed(table: str, batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch with the columns that were added to its table since."""
    whole = conform(table, pa.Table.from_batches([batch]))
    return whole.combine_chunks().to_batches()[0] if whole.num_rows else batch


def _record(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in Manifest.__slots__ if name != "coming"}


def _manifest_path(ref: PartRef) -> str:
    return layout.part_manifest(ref.table, ref.name, ref.round)


def _sha256(lake: Lake, rel: str) -> str:
    digest = hashlib.sha256()
    with lake.root.open(rel) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
