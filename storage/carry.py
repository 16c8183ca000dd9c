"""Work of an earlier round that a later one would only repeat: the same rows, under the later round's number.

A round that follows a refused one starts from the same champion. What its fingerprints say is the same (a captioner,
a filter, the captions of a shard) is taken over, so that only what changed is computed.
"""

import logging

import pyarrow as pa

from storage import layout, registry
from storage.fingerprint import Basis, canonical, fingerprint_of
from storage.lake import Lake
from storage.manifest import Manifest, read_manifest
from storage.registry import ModelRef
from storage.tables import Counts, PartRef, commit_part, committed_part, read_part

logger = logging.getLogger(__name__)


def carried_part(lake: Lake, table: str, name: str, *, round: int, basis: Basis) -> PartRef | None:
    """Commit to `round` the rows of an earlier round's part that was made from `basis`; None without one."""
    found = _earlier(lake, table, name, round, basis)
    if found is None:
        return None
    number, manifest = found
    ref = committed_part(lake, table, name, round=number)
    assert ref is not None, f"{layout.part(table, name, number)} has a manifest and no part"
    rows = read_part(lake, ref)
    place = rows.schema.get_field_index("round")
    field = rows.schema.field(place)
    rows = rows.set_column(place, field, pa.repeat(pa.scalar(round, field.type), len(rows)))
    counts = Counts(num_in=manifest.num_in, num_ok=manifest.num_ok, reasons=dict(manifest.reasons))
    part = commit_part(lake, table, name, rows, round=round, basis=basis, counts=counts)
    logger.info("%s of round %d is that of round %d: nothing changed", name, round, number)
    return part


def carried_model(lake: Lake, name: str, role: str, *, round: int, basis: Basis) -> ModelRef | None:
    """Register in `round` a model that an earlier round trained from `basis`; None without one, or without its files.

    `name` is the part of `metrics` with its training curve, which is taken over too and says that it is finished.
    """
    found = _earlier(lake, "metrics", name, round, basis)
    if found is None:
        return None
    ref = committed_part(lake, "metrics", name, round=found[0])
    assert ref is not None, f"{layout.part('metrics', name, found[0])} has a manifest and no part"
    model_id = read_part(lake, ref, ["model_id"]).column(0)[0].as_py()
    if not lake.root.exists(layout.model_file(model_id, registry.WEIGHTS)):
        return None
    lineage = registry.lineage_of(lake, model_id)
    record = lineage | {"role": role, "round": round, "config": canonical(lineage["config"])}
    model = registry.record_model(lake, record)
    carried_part(lake, "metrics", name, round=round, basis=basis)
    return model


def _earlier(
    lake: Lake, table: str, name: str, round: int, basis: Basis
) -> tuple[int, Manifest] | None:
    """The latest earlier round with a part made from `basis`, and its manifest."""
    wanted = fingerprint_of(basis)
    for number in range(round - 1, 0, -1):
        manifest = read_manifest(lake.root, layout.part_manifest(table, name, number))
        if manifest is not None and manifest.fingerprint == wanted:
            return number, manifest
    return None
