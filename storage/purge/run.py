"""A purge, from what was asked for to the proof; killed anywhere, it is gone on with."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import addresses, layout
from storage.catalog import write_catalog
from storage.errors import ConfigError, CorruptData, PurgeNotClean
from storage.fingerprint import basis_of
from storage.lake import Lake
from storage.purge import scratch
from storage.purge.parts import (
    edit_part,
    rebase,
    rows_by_part,
    settle_all,
    with_outcome,
    without_images,
)
from storage.purge.plan import ContentChanges, Found, Plan, begin, begun, find
from storage.purge.proof import Proof, places_by_shard, prove
from storage.purge.request import Request
from storage.purge.tars import blank
from storage.schemas import PURGED, PURGED_STATUS
from storage.tables import (
    PartRef,
    commit_part,
    committed_part,
    list_parts,
    part_manifest,
    read_part,
)
from storage.trainset import drop_images

logger = logging.getLogger(__name__)

STAGE_VERSION = 1

RebuildReport = Callable[[Lake, int], None]
"""Write the page of a round anew."""

Progress = Callable[[str, int, int], None]
"""Told what is being cleared, and how many of how many are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """A finished purge, or one that was finished before."""

    plan: Plan | None
    """None when everything that was asked for had been purged before."""
    proof: Proof
    rows: pa.Table
    """The rows of `purged`."""
    earlier: tuple[str, ...] = ()
    """Purges that had taken it out before."""
    reports_removed: tuple[int, ...] = ()
    """Rounds whose page could not be written anew and is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a purge needs from outside this package."""

    content_changes: ContentChanges | None = None
    rebuild_report: RebuildReport | None = None
    on_progress: Progress | None = None

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how far it is."""
        if self.on_progress is not None:
            self.on_progress(what, done, total)


def purge(lake: Lake, request: Request, around: Around | None = None) -> Purged:
    """Take out for good what is asked for, and prove it; asked again, prove it again.

    A purge that was begun and not finished is finished first. Raises LakeBusy while somebody works on the lake, ConfigError
    when nothing matches, PurgeNotClean when something is left.
    """
    around = around or Around()
    with lake.lock("purge", half_purged=True):
        finished = _finish_begun(lake, around)
        found = find(lake, request, around.content_changes)
        if found.plan.num_rows:
            begin(lake, found)
            return _finish(lake, found, around)
        if finished and finished.plan and finished.plan.asked == found.plan.asked:
            return finished
        return _proved_again(lake, found)


def resume(lake: Lake, around: Around | None = None) -> Purged | None:
    """Finish the purge that was begun; None when there is none."""
    with lake.lock("purge", half_purged=True):
        return _finish_begun(lake, around or Around())


def _finish_begun(lake: Lake, around: Around) -> Purged | None:
    unfinished = begun(lake)
    kept = unfinished.plan.purge_id if unfinished else None
    for name in lake.root.list(layout.PURGES):
        if not name.endswith(".json") and name != kept:  # killed before it was begun
            lake.root.remove(f"{layout.PURGES}/{name}")
    if unfinished is None:
        return None
    if lake.root.exists(layout.purge_record(unfinished.plan.purge_id)):
        _close(lake, unfinished.plan)
        return None
    logger.info("purge %s was begun at %s: finishing it", kept, unfinished.plan.begun_at)
    return _finish(lake, unfinished, around)


def _finish(lake: Lake, found: Found, around: Around) -> Purged:
    """The work. Each step finds what is left of it to do; tables go before the bytes that they point to."""
    plan = found.plan
    settle_all(lake)
    trainsets = _clear_training_sets(lake, found, around)
    _clear_tables(lake, found, around)
    rebase(lake, plan.content, trainsets)
    _mend_intakes(lake)
    for number, (shard, images) in enumerate(places_by_shard(found.rows), start=1):
        if layout.in_place_set(shard) is None:
            blank(lake, shard, images)
        around.tell("shards", number, len(plan.shards))
    removed = _clear_reports(lake, plan, around)
    _commit_rows(lake, found)
    if lake.root.exists(layout.CATALOG):
        write_catalog(lake)
    scratch.throw_away(lake)
    rows = read_part(lake, _rows_part(lake, plan.purge_id))
    proof = prove(lake, rows, found.texts.column(0).to_pylist())
    if not proof.is_clean:
        raise PurgeNotClean(
            f"purge {plan.purge_id} of {lake.uri} is not finished: {'; '.join(proof.findings()[:5])}; run "
            "`bootstrap purge --resume` to try again, and report it when this comes again"
        )
    record = asdict(plan) | {"proof": asdict(proof), "reports_removed": removed}
    record = {name: value for name, value in record.items() if name not in ("content", "planted")}
    lake.root.write_bytes(layout.purge_record(plan.purge_id), json.dumps(record, indent=1).encode())
    _close(lake, plan)
    logger.info("purge %s is finished: %d images", plan.purge_id, plan.num_images)
    return Purged(plan=plan, proof=proof, rows=rows, reports_removed=tuple(removed))


def _close(lake: Lake, plan: Plan) -> None:
    """Let go of what the purge worked from: it holds texts of the images."""
    lake.root.remove(layout.purge_folder(plan.purge_id))
    lake.root.remove(layout.PURGE_BEGUN)


def _clear_training_sets(lake: Lake, found: Found, around: Around) -> dict[str, str]:
    """Training sets without the images, by the fingerprint of what each was."""
    successors = {}
    sets = found.plan.training_sets
    for number, fingerprint in enumerate(sets, start=1):
        if lake.root.exists(layout.trainset(fingerprint)):
            drop_images(lake, fingerprint, found.image_ids, found.plan.purge_id)
        record = json.loads(lake.root.read_bytes(layout.trainset_successor(fingerprint)))
        if record["successor"] is not None:
            successors[fingerprint] = record["successor"]
        around.tell("training sets", number, len(sets))
    return successors


def _clear_tables(lake: Lake, found: Found, around: Around) -> None:
    """Rows of pairs become outcomes, those of all other tables go; every part is written once."""
    plan, rows = found.plan, found.rows
    edits = []
    for ref in list_parts(lake, "pairs"):
        keys = rows.filter(pc.equal(rows.column("part"), ref.path)).column("key").combine_chunks()
        if len(keys) and _is_unpurged(lake, ref, keys):
            edits.append((ref, with_outcome(keys, plan.because)))
    drop = without_images(found.image_ids, plan.planted)
    for table, concerned in rows_by_part(lake, found.image_ids, plan.planted).items():
        edits += [(ref, drop) for ref in list_parts(lake, table) if ref.path in concerned]
    for number, (ref, edit) in enumerate(edits, start=1):
        edit_part(lake, ref, edit)
        around.tell("tables", number, len(edits))


def _is_unpurged(lake: Lake, ref: PartRef, keys: pa.Array) -> bool:
    table = read_part(lake, ref, ["key", "status"])
    named = table.filter(pc.is_in(table.column("key"), value_set=keys))
    return bool(pc.any(pc.not_equal(named.column("status"), PURGED_STATUS)).as_py())


def _mend_intakes(lake: Lake) -> None:
    """Records of intakes name their parts as they are now, so that a run again finds them finished."""
    for path in lake.root.list_recursive(layout.ROUNDS):
        if not path.rpartition("/")[2].startswith("intake-"):
            continue
        record = json.loads(lake.root.read_bytes(path))
        parts = [_as_it_is(lake, part) for part in record["parts"]]
        if parts != record["parts"]:
            data = json.dumps(record | {"parts": parts}, indent=2, sort_keys=True)
            lake.root.write_bytes(path, data.encode())


def _as_it_is(lake: Lake, part: dict[str, Any]) -> dict[str, Any]:
    ref = committed_part(lake, part["table"], part["name"], round=part["round"])
    if ref is None or not part_manifest(lake, ref).purged:
        return part
    return asdict(ref)


def _clear_reports(lake: Lake, plan: Plan, around: Around) -> list[int]:
    """Pages written anew from what is left; those that cannot be are removed, and their rounds named."""
    removed = []
    for number, round in enumerate(plan.reports, start=1):
        try:
            if around.rebuild_report is None:
                raise LookupError("nobody to write it")
            around.rebuild_report(lake, round)
        except (LookupError, ConfigError, CorruptData) as err:
            logger.warning("the report of round %d is removed: %s", round, err)
            lake.root.remove(layout.report(round))
            removed.append(round)
        around.tell("reports", number, len(plan.reports))
    return removed


def _commit_rows(lake: Lake, found: Found) -> None:
    """What was purged, as rows of the table `purged`: what intakes refuse from now on."""
    plan = found.plan
    if committed_part(lake, "purged", plan.purge_id) is not None:
        return
    num_rows = len(found.rows)
    begun_at = datetime.fromisoformat(plan.begun_at)
    same = {
        "purge_id": pa.repeat(plan.purge_id, num_rows),
        "because": pa.repeat(plan.because, num_rows),
        "purged_at": pa.repeat(pa.scalar(begun_at, PURGED.field("purged_at").type), num_rows),
    }
    table = pa.table(same | {n: found.rows.column(n) for n in PURGED.names if n not in same})
    basis = basis_of("purge", STAGE_VERSION, {"purge_id": plan.purge_id}, [])
    commit_part(lake, "purged", plan.purge_id, table, basis=basis)


def _rows_part(lake: Lake, purge_id: str) -> PartRef:
    ref = committed_part(lake, "purged", purge_id)
    assert ref is not None, f"purge {purge_id} has no part of the table purged"
    return ref


def _proved_again(lake: Lake, found: Found) -> Purged:
    """The proof of what was purged before."""
    known = found.already
    keys, ids = (known.column(name).combine_chunks() for name in ("key", "image_id"))
    normal = [addresses.normal(url) for url in known.column("url").to_pylist()]
    wanted = {
        "key": keys.cast(pa.string()),
        "image_id": ids.cast(pa.string()).drop_null(),
        "address": pa.array([each for each in normal if each is not None], pa.string()),
    }
    rows = PURGED.empty_table()
    for ref in list_parts(lake, "purged"):
        table = read_part(lake, ref)
        tests = [pc.is_in(table.column(name), value_set=values) for name, values in wanted.items()]
        rows = pa.concat_tables([rows, table.filter(pc.or_(pc.or_(*tests[:2]), tests[2]))])
    proof = prove(lake, rows, None, with_scratch=False)
    if not proof.is_clean:
        raise PurgeNotClean(
            f"{lake.uri} holds something again that was purged: {'; '.join(proof.findings()[:5])}"
        )
    return Purged(
        plan=None,
        proof=proof,
        rows=rows,
        earlier=tuple(rows.column("purge_id").unique().to_pylist()),
    )
