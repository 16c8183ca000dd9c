"""Find what is damaged, name it, and drop it so that its stage makes it again.

Nothing is mended in place: a part is dropped with its manifest, a shard with the pairs that point
into it, a model with its rows. The next run of the same command sees them missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from storage import layout, registry
from storage.errors import CorruptData, CorruptPart
from storage.lake import Lake
from storage.manifest import read_manifest
from storage.schemas import OK, TABLES
from storage.shards import iter_shard, read_verified_image
from storage.tables import PartRef, check_part, drop_part, iter_part, list_parts


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged thing of a lake."""

    path: str
    why: str
    drop: Callable[[], None]
    """Removes it together with what depends on its bytes."""


def find_damage(lake: Lake) -> Iterator[Damage]:
    """Everything whose bytes are not what was committed; reads the whole lake.

    Unreadable manifests hide their parts: while there are any, they alone are named.
    """
    manifests = list(_damaged_manifests(lake))
    if manifests:
        yield from manifests
        return
    for table in TABLES:
        for ref in list_parts(lake, table):
            try:
                check_part(lake, ref, full=True)
            except CorruptPart as err:
                yield Damage(ref.path, str(err), partial(drop_part, lake, ref))
                continue
            if table == "pairs":
                yield from _damaged_shard(lake, ref)
    if any(True for _ in _damaged_models_table(lake)):
        return
    for model in registry.list_models(lake):
        if model.is_foreign:
            continue
        try:
            registry.local_folder(lake, model)
        except CorruptData as err:
            yield Damage(model.path, str(err), partial(_drop_model, lake, model))


def repair(lake: Lake) -> list[Damage]:
    """Drop all damage and unfinished writes (hold the lake's lock); what was dropped."""
    dropped: list[Damage] = []
    while found := list(find_damage(lake)):
        for damage in found:
            damage.drop()
        dropped += found
    for folder in (layout.TABLES, layout.SHARDS, layout.MODELS, layout.ROUNDS):
        lake.root.sweep(folder)
    return dropped


def _damaged_manifests(lake: Lake) -> Iterator[Damage]:
    for rel in _manifest_paths(lake):
        try:
            read_manifest(lake.root, rel)
        except CorruptPart as err:
            yield Damage(rel, str(err), partial(lake.root.remove, rel))


def _damaged_models_table(lake: Lake) -> Iterator[PartRef]:
    """Parts of the models table that cannot be read, and so cannot name their models."""
    for ref in list_parts(lake, "models"):
        try:
            check_part(lake, ref, full=True)
        except CorruptPart:
            yield ref


def _manifest_paths(lake: Lake) -> list[str]:
    found = lake.root.list_recursive(layout.TABLES)
    return [rel for rel in found if rel.endswith(".json")]


def _damaged_shard(lake: Lake, pairs: PartRef) -> Iterator[Damage]:
    """The shard of a pairs part, when an image in it is not the one that the rows name."""
    columns = ["status", "shard", "offset", "size", "image_id"]
    try:
        for batch in iter_part(lake, pairs, columns):
            for row in batch.to_pylist():
                if row["status"] == OK:
                    where = (row["shard"], row["offset"], row["size"])
                    read_verified_image(lake, *where, row["image_id"])
        if lake.root.exists(layout.shard(pairs.name)):
            for _ in iter_shard(lake, pairs.name):
                pass
    except CorruptData as err:
        yield Damage(layout.shard(pairs.name), str(err), partial(_drop_shard, lake, pairs))


def _drop_shard(lake: Lake, pairs: PartRef) -> None:
    for ref in list_parts(lake, "captions", 0):
        if ref.name == pairs.name:
            drop_part(lake, ref)
    drop_part(lake, pairs)
    lake.root.remove(layout.shard(pairs.name))


def _drop_model(lake: Lake, model: registry.ModelRef) -> None:
    for ref in list_parts(lake, "models"):
        if ref.name.endswith(model.model_id):
            drop_part(lake, ref)
    lake.root.remove(model.path)
