"""What stages will compute of a lake's rows once some images are gone: so that a run after a purge finds its parts.

A basis holds fingerprints of the rows that a part was made of. The same functions that the stages call are asked twice: of
the lake as it is, and of the lake without the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from flows.report import build_report
from flows.steps import canaries, judge
from flows.steps.caption import images_input
from flows.steps.evaluate import heldout_inputs
from flows.steps.heldout import held_out_of
from flows.steps.score import texts_input
from storage import (
    Lake,
    PartRef,
    committed_part,
    connect,
    layout,
    list_parts,
    part_manifest,
    read_part,
    rounds,
)
from storage.purge import Around

if TYPE_CHECKING:
    from storage.purge.run import Progress

Hide = Callable[[duckdb.DuckDBPyConnection], None]
Change = tuple[str, str, str]
"""Path of a part, what went into it, and what will from now on."""

MEASURED = ("evaluate", "measure-arm")
"""Stages that measure on the held-out images."""
MOST_UNREADABLE = 8
"""Texts of a judge's sample that have no row because their pictures could not be decoded, more are not looked for."""


def content_changes(lake: Lake, image_ids: pa.Array, hide: Hide) -> Iterator[Change]:
    """Every fingerprint of rows in the basis of a committed part that is another one without the images."""
    gone = set(image_ids.to_pylist())
    for pairs in list_parts(lake, "pairs"):
        ids = read_part(lake, pairs, ["image_id"]).column(0)
        if pc.any(pc.is_in(ids, value_set=image_ids)).as_py():
            yield from _of_shard(lake, pairs, gone)
    yield from _of_heldout(lake, hide)
    for record in rounds.list_rounds(lake):
        yield from _of_audit(lake, record.round, hide)


def _of_shard(lake: Lake, pairs: PartRef, gone: set[str]) -> Iterator[Change]:
    """Captions are made of the images of a shard, scores of its texts, some of which are of images elsewhere."""
    rows = read_part(lake, pairs, ["image_id", "status", "pool", "shard"]).to_pylist()
    web = [row for row in rows if row["pool"] == "web" and row["shard"] is not None]
    ids = [row["image_id"] for row in web if row["status"] == "ok"]
    if gone.isdisjoint(row["image_id"] for row in web):
        return
    left = [image_id for image_id in ids if image_id not in gone]
    texts_of_web = _texts(lake, committed_part(lake, "captions", pairs.name, round=0))
    for record in rounds.list_rounds(lake):
        for variant in [None, *_variants(lake, pairs, record.round)]:
            captions, scores = (
                committed_part(
                    lake,
                    layout.variant_table(table, variant),
                    layout.variant_part(pairs.name, variant),
                    round=record.round,
                )
                for table in ("captions", "scores")
            )
            if captions is not None:
                yield captions.path, images_input(ids), images_input(left)
            if scores is not None:
                # Web texts have their scores from the round.
                texts = [*(texts_of_web if variant is None else []), *_texts(lake, captions)]
                kept = [caption_id for caption_id, image_id in texts if image_id not in gone]
                yield scores.path, texts_input(each[0] for each in texts), texts_input(kept)


def _variants(lake: Lake, pairs: PartRef, round: int) -> list[str]:
    """Other decodings whose captions of a shard lie beside a round's."""
    parts = list_parts(lake, "variant_captions", round)
    ending = f"-{pairs.name}"
    return [part.name.removesuffix(ending) for part in parts if part.name.endswith(ending)]


def _texts(lake: Lake, part: PartRef | None) -> list[tuple[str, str]]:
    """(caption_id, image_id) of the ok texts of a part."""
    if part is None:
        return []
    rows = read_part(lake, part, ["caption_id", "image_id", "status"]).to_pylist()
    return [(row["caption_id"], row["image_id"]) for row in rows if row["status"] == "ok"]


def _of_heldout(lake: Lake, hide: Hide) -> Iterator[Change]:
    """Figures and ranks are measured on the held-out images with their texts."""
    measured: dict[int | None, list[str]] = {}
    for table in ("metrics", "ranks", "arm_resamples"):
        for part in list_parts(lake, table):
            manifest = part_manifest(lake, part)
            if manifest.stage in MEASURED:
                most = manifest.basis["config"].get("max_images")
                measured.setdefault(most, []).append(part.path)
    for most, paths in measured.items():
        old, new = _twice(lake, None, hide, partial(_heldout, most))
        yield from ((path, old, new) for path in paths)


def _of_audit(lake: Lake, round: int, hide: Hide) -> Iterator[Change]:
    """Canaries are made of the human images set aside and of what people say; the judge sees a sample of the texts."""
    for part in list_parts(lake, "canaries", round):
        yield part.path, *_twice(lake, round, hide, _canary_images)
        yield part.path, *_twice(lake, None, hide, _human_texts)
    for part in list_parts(lake, "judgements", round):
        for each in _sample_sizes(lake, part):
            old, new = _twice(lake, round, hide, partial(_sample, round, each))
            if old in part_manifest(lake, part).inputs:
                yield part.path, old, new
                break


def _heldout(most: int | None, con: duckdb.DuckDBPyConnection) -> str:
    (found,) = heldout_inputs(held_out_of(con, most))
    return found


def _canary_images(con: duckdb.DuckDBPyConnection) -> str:
    return canaries.images_input(canaries.canary_images_of(con))


def _human_texts(con: duckdb.DuckDBPyConnection) -> str:
    return canaries.texts_input(canaries.human_texts(con))


def _sample(round: int, each: int, con: duckdb.DuckDBPyConnection) -> str:
    """Of `each` texts of every source."""
    return judge.sample_input(judge.sample_of(con, round, 2 * each))


def _sample_sizes(lake: Lake, part: PartRef) -> range:
    """What may have been asked of each source: nobody wrote it down, and rows may be fewer than were asked for."""
    rows = read_part(lake, part, ["source"]).column(0).value_counts().to_pylist()
    most = max((row["counts"] for row in rows), default=0)
    lost = int(part_manifest(lake, part).purged.get("rows", 0)) + MOST_UNREADABLE
    return range(max(1, most), most + lost + 1)


def _twice(
    lake: Lake, as_of: int | None, hide: Hide, ask: Callable[[duckdb.DuckDBPyConnection], str]
) -> tuple[str, str]:
    """What is found with the images and without them."""
    with connect(lake, as_of=as_of) as con:
        before = ask(con)
        hide(con)
        return before, ask(con)


def around(on_progress: Progress | None = None) -> Around:
    """What a purge needs of the flows: what parts will say they were made of, and reports."""
    return Around(
        content_changes=content_changes, rebuild_report=_rebuild_report, on_progress=on_progress
    )


def _rebuild_report(lake: Lake, round: int) -> None:
    """The page again, with as many pictures in a group as it had."""
    try:
        page = lake.root.read_bytes(layout.report(round)).decode("utf-8", "replace")
    except FileNotFoundError:
        page = ""
    groups = page.split('<ul class="cards"')[1:]
    shown = max((group.count("<li data-source=") for group in groups), default=0)
    build_report(lake, round, gallery_pairs=shown)
