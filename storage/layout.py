"""Where everything lies in a lake: the only module that joins paths.

lake.json  lake.lock  champion.json  catalog.duckdb
tables/<table>/[round=0003/]<part>.parquet    with its manifest <part>.json beside it
shards/<shard>.tar                            images, written once
shards/<image set>.json                       where the files of an image set lie
models/<model_id>/                            weights, tokenizer, lineage.json
rounds/0003/                                  settings, record, policy and intakes of a round
trainsets/<fingerprint>.arrow                 rows of one training set
trainsets/<fingerprint>.json                  what took its place when images were purged
reports/round=0003/index.html
purges/begun.json                             the purge that is not finished, if there is one
purges/<purge_id>.json                        what a purge took out, and the proof
work/                                         scratch of unfinished stages, never read by others
"""

import re

LAKE = "lake.json"
LOCK = "lake.lock"
CHAMPION = "champion.json"
CATALOG = "catalog.duckdb"
WORK = "work"
TABLES = "tables"
SHARDS = "shards"
MODELS = "models"
ROUNDS = "rounds"
TRAINSETS = "trainsets"
REPORTS = "reports"
PURGES = "purges"
PURGE_BEGUN = "purges/begun.json"
_IN_PLACE = re.compile(r"(web-\d{4}-t\d{2})-\d{5,}")


def table_dir(table: str, round: int | None = None) -> str:
    """The folder of a table, or of one round of it."""
    return f"{TABLES}/{table}" if round is None else f"{TABLES}/{table}/round={round:04d}"


def part(table: str, name: str, round: int | None = None) -> str:
    """The Parquet file of a part."""
    return f"{table_dir(table, round)}/{name}.parquet"


def part_manifest(table: str, name: str, round: int | None = None) -> str:
    """The manifest of a part: when it exists, the part is committed."""
    return f"{table_dir(table, round)}/{name}.json"


def shard(name: str) -> str:
    """The tar of a shard."""
    return f"{SHARDS}/{name}.tar"


def model_dir(model_id: str) -> str:
    """The folder of a checkpoint."""
    return f"{MODELS}/{model_id}"


def model_file(model_id: str, name: str) -> str:
    """A file of a checkpoint."""
    return f"{MODELS}/{model_id}/{name}"


def lineage(model_id: str) -> str:
    """The record of a checkpoint's origin, written last."""
    return model_file(model_id, "lineage.json")


def round_dir(round: int) -> str:
    """The folder of a round's own files."""
    return f"{ROUNDS}/{round:04d}"


def round_settings(round: int) -> str:
    """The settings that a round was begun with."""
    return f"{round_dir(round)}/settings.json"


def round_record(round: int) -> str:
    """How a round went so far."""
    return f"{round_dir(round)}/record.json"


def round_policy(round: int) -> str:
    """Which policy's decisions count in a round."""
    return f"{round_dir(round)}/policy.json"


def intake_record(round: int, name: str) -> str:
    """The record of a finished intake of a round."""
    return f"{round_dir(round)}/intake-{name}.json"


def recheck_record(round: int) -> str:
    """What asking again for kept images has shown after a round."""
    return f"{round_dir(round)}/recheck.json"


def trainset(fingerprint: str) -> str:
    """The Arrow file of a training set."""
    return f"{TRAINSETS}/{fingerprint}.arrow"


def trainset_successor(fingerprint: str) -> str:
    """What took the place of a training set whose images were purged."""
    return f"{TRAINSETS}/{fingerprint}.json"


def purge_record(purge_id: str) -> str:
    """The record of a finished purge."""
    return f"{PURGES}/{purge_id}.json"


def purge_folder(purge_id: str) -> str:
    """What an unfinished purge works from; it goes when the purge is finished."""
    return f"{PURGES}/{purge_id}"


def purge_work(purge_id: str, name: str) -> str:
    """A file that an unfinished purge works from."""
    return f"{purge_folder(purge_id)}/{name}"


def report(round: int) -> str:
    """The report of a round."""
    return f"{REPORTS}/round={round:04d}/index.html"


def web_shards(round: int, position: int | None = None) -> str:
    """What the names of a round's web shards begin with; they sort by round, then by list."""
    return f"web-{round:04d}-" if position is None else f"web-{round:04d}-{position:02d}"


def image_set(round: int, position: int, *, in_place: bool) -> str:
    """What the names of an image set's shards begin with: after those of the round's lists, and telling whether the
    tars are the user's own, which the lake points to."""
    return f"{web_shards(round)}{'t' if in_place else 'p'}{position:02d}"


def image_set_record(prefix: str) -> str:
    """Where the files of an image set lie."""
    return f"{SHARDS}/{prefix}.json"


def in_place_set(shard: str) -> str | None:
    """The image set whose own tar a shard is; None of a shard that the lake holds."""
    found = _IN_PLACE.fullmatch(shard)
    return found.group(1) if found else None


def variant_table(table: str, variant: str | None) -> str:
    """The table beside `table` that holds the same of another decoding's captions; `table` itself without a variant."""
    return table if variant is None else f"variant_{table}"


def variant_part(shard: str, variant: str | None) -> str:
    """The name of the part that is made from a shard; those of several variants lie side by side."""
    return shard if variant is None else f"{variant}-{shard}"


def part_name(source: str, index: int) -> str:
    """The name of the index-th shard of a source, and of the parts made from it."""
    return f"{source}-{index:05d}"
