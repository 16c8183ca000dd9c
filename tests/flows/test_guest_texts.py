"""Texts that a later list brings for images of an earlier shard: scored with the image, decided on with its other texts."""

from pathlib import Path
from typing import Any

import pytest
from cycle import FinishedCycle, before_captioning, file_hashes

from flows import models
from flows.purge_bases import content_changes
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.curate_shards import curate_shards
from storage import Lake, decide, ids, list_parts, query, read_part
from storage.fingerprint import basis_of
from storage.purge import Around, Request, asked_image, purge
from storage.tables import Counts, commit_part, rows_table

SHARD = "web-0001-01-00000"
TABLES = ("tables/captions/round=0001", "tables/scores/round=0001")


@pytest.fixture
def cycle(finished: FinishedCycle, tmp_path: Path) -> FinishedCycle:
    """A lake before captioning whose second list is three texts for pictures of the first one's two shards."""
    cycle = before_captioning(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    first = [p for p in list_parts(lake, "pairs") if p.name.startswith("web-0001-00-")]
    stored = [
        [row for row in read_part(lake, part).to_pylist() if row["status"] == "ok"]
        for part in first
    ]
    pairs, captions = [], []
    for number, home in enumerate([stored[1][0], stored[0][3], stored[0][3]]):
        text = f"another text {number}"
        told = {"key": ids.pair_key("later", home["url"], text), "row": number, "alt_text": text}
        said = {"status": "duplicate_url", "reason": "in the lake already", "source_name": "later"}
        pairs.append(home | told | said)
        caption_id = ids.caption_id(home["image_id"], "web", text)
        about = {"caption_id": caption_id, "image_id": home["image_id"], "source": "web"}
        captions.append(about | {"caption": text, "status": "ok", "round": 0})
    basis = basis_of("made", 1, {}, [])
    counts = Counts(num_in=3, num_ok=0, reasons={"duplicate_url": 3})
    commit_part(lake, "captions", SHARD, rows_table("captions", captions), round=0, basis=basis)
    commit_part(lake, "pairs", SHARD, rows_table("pairs", pairs), basis=basis, counts=counts)
    return cycle


def _run(cycle: FinishedCycle) -> Run:
    return Run(Lake.open(str(cycle.lake)), parse_settings(cycle.settings), 1)


def _curate(run: Run, *, fused: bool) -> None:
    captioner, scorer = (models.require(run, role, 1) for role in ("captioner", "filter"))
    passes = [(captioner, scorer)] if fused else [(captioner, None), (None, scorer)]
    for each in passes:
        curate_shards(run, *each, lambda done, total, note: None)


def _part(run: Run, table: str) -> list[dict[str, Any]]:
    (part,) = [p for p in list_parts(run.lake, table, 1) if p.name == SHARD]
    return read_part(run.lake, part).to_pylist()


def _parquet(lake: Path) -> dict[str, str]:
    return {k: v for k, v in file_hashes(lake, *TABLES).items() if k.endswith(".parquet")}


def test_guests_are_scored_and_not_captioned_in_one_pass_and_in_two(
    cycle: FinishedCycle, tmp_path: Path
) -> None:
    run = _run(cycle)
    _curate(run, fused=False)
    assert _part(run, "captions") == []
    scores = _part(run, "scores")
    assert len(scores) == 3
    assert all(row["status"] == "ok" and 0 <= row["itm_prob"] <= 1 for row in scores)
    apart = _parquet(cycle.lake)
    for table in ("captions", "scores"):
        for part in list_parts(run.lake, table, 1):
            for rel in (part.path, part.path.replace(".parquet", ".json")):
                run.lake.root.remove(rel)
    _curate(run, fused=True)
    assert _parquet(cycle.lake) == apart
    # Each text is decided on beside the others of its picture, and is of the picture's source.
    decide(run.lake, 1, "top_k", {"k": 1000})
    found = query(
        run.lake,
        "SELECT caption, source_name, itm_prob FROM clean WHERE caption LIKE 'another text%'",
    ).to_pylist()
    assert len(found) == 3
    assert all(row["itm_prob"] is not None and row["source_name"] != "later" for row in found)


def test_a_purge_of_an_image_leaves_the_scores_of_its_guests_shard_valid(
    cycle: FinishedCycle,
) -> None:
    run = _run(cycle)
    _curate(run, fused=False)
    gone = _part(run, "scores")[0]["image_id"]
    around = Around(content_changes=content_changes)
    done = purge(run.lake, Request(asked=(asked_image(gone),), because="asked by mail"), around)
    assert done.proof.is_clean
    left = _part(run, "scores")
    assert gone not in {row["image_id"] for row in left}
    assert len(left) in (1, 2)
    before = _parquet(cycle.lake)
    _curate(_run(cycle), fused=False)
    assert _parquet(cycle.lake) == before, "parts are found, not made anew"
