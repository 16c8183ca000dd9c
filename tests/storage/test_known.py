"""A web picture that shows what an evaluation shows is never taken in, and copies are known again."""

import json
from pathlib import Path

from web_world import PictureServer, copy_of, download_config, photo, write_list

from storage import (
    CaptionSetConfig,
    Lake,
    UrlListConfig,
    ingest_captions,
    ingest_urls,
    query,
)
from storage.canaries import CanaryDraw, draw_canaries
from storage.tables import drop_part

PAGES = [
    "photo1.jpg",
    "photo2.jpg",
    "copy3.jpg",
    "photo3.jpg",
    "copy4.jpg",
    "photo4.jpg",
    "photo4.jpg?again",
    "copy5.jpg",
]


def _lake(folder: Path, pool: str, seeds: list[int]) -> Lake:
    """A lake with a set of copies of some pictures."""
    images = folder / pool
    images.mkdir()
    for seed in seeds:
        (images / f"{seed}.jpg").write_bytes(copy_of(seed) if seed != 3 else photo(3))
    listed = [{"image": f"{seed}.jpg", "caption": f"picture {seed}"} for seed in seeds]
    table = folder / f"{pool}.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in listed))
    lake = Lake.open(str(folder / "lake"), create=True)
    ingest_captions(
        lake,
        CaptionSetConfig(captions=str(table), images=str(images), pool=pool, name=pool),  # type: ignore[arg-type]
    )
    return lake


def _statuses(lake: Lake, folder: Path, pictures: PictureServer, **changes: object) -> list[str]:
    rows = [(page, f"a text for {page}") for page in PAGES]
    path = write_list(folder / "urls.parquet", rows, host="alike.test")
    ingest_urls(lake, UrlListConfig(path=str(path)), download_config(pictures, **changes), round=1)
    found = query(lake, "SELECT status, reason FROM pairs WHERE pool = 'web' ORDER BY \"row\"")
    assert all(row["reason"] for row in found.to_pylist() if row["status"] != "ok")
    return [row["status"] for row in found.to_pylist()]


def test_copies_of_held_out_pictures_are_not_taken_in(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake = _lake(tmp_path, "heldout", [1, 3])
    assert _statuses(lake, tmp_path, pictures) == [
        "eval_overlap",
        "ok",
        "eval_overlap",
        "eval_overlap",
        "ok",
        "ok",
        "duplicate_image",
        "ok",
    ]
    reason = query(lake, "SELECT reason FROM pairs WHERE status = 'eval_overlap' LIMIT 1")
    held_out = query(lake, "SELECT image_id FROM pairs WHERE pool = 'heldout'").to_pylist()
    assert any(row["image_id"] in reason.to_pylist()[0]["reason"] for row in held_out)


def test_copies_of_canaries_are_not_taken_in_and_those_of_other_human_pictures_are(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake = _lake(tmp_path, "human", [1, 2, 3, 4, 5])
    draw_canaries(lake, 1, CanaryDraw(share=0.5, max_images=100, seed=0))
    drawn = query(
        lake, "SELECT url FROM pairs JOIN canary_draws USING (image_id) WHERE is_canary"
    ).to_pylist()
    canaries = {row["url"].removesuffix(".jpg") for row in drawn}
    assert 0 < len(canaries) < 5
    found = _statuses(lake, tmp_path, pictures)
    for page, status in zip(PAGES, found, strict=True):
        number = page.removeprefix("photo").removeprefix("copy")[0]
        assert (status == "eval_overlap") == (number in canaries and "again" not in page), page


def test_near_duplicates_are_dropped_when_asked(tmp_path: Path, pictures: PictureServer) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    found = _statuses(lake, tmp_path, pictures, near_duplicates="drop", shard_rows=3)
    assert found == [
        "ok",
        "ok",
        "ok",
        "near_duplicate",
        "ok",
        "near_duplicate",
        "duplicate_image",
        "ok",
    ]
    # A later round knows them from the lake.
    path = write_list(tmp_path / "more.parquet", [("copy2.jpg", "two")], host="alike.test")
    config = download_config(pictures, near_duplicates="drop", shard_rows=3)
    ingest_urls(lake, UrlListConfig(path=str(path)), config, round=2)
    last = query(lake, "SELECT status FROM pairs WHERE url LIKE '%copy2%'").to_pylist()
    assert [row["status"] for row in last] == ["near_duplicate"]


def test_what_looks_alike_is_kept_when_asked(tmp_path: Path, pictures: PictureServer) -> None:
    lake = _lake(tmp_path, "heldout", [1, 3])
    found = _statuses(lake, tmp_path, pictures, eval_overlap="keep")
    assert found == ["ok", "ok", "ok", "ok", "ok", "ok", "duplicate_image", "ok"]


def test_a_shard_that_is_made_again_finds_the_same_copies_of_what_was_refused(
    tmp_path: Path, pictures: PictureServer
) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    rows = [(name, name) for name in ("photo1.jpg", "copy1.jpg", "copy1.jpg?again", "photo2.jpg")]
    path = write_list(tmp_path / "urls.parquet", rows, host="again.test")
    config = download_config(pictures, near_duplicates="drop", shard_rows=1)
    parts = ingest_urls(lake, UrlListConfig(path=str(path)), config, round=1)
    expected = ["ok", "near_duplicate", "duplicate_image", "ok"]
    asked = 'SELECT status FROM pairs ORDER BY "row"'
    assert [row["status"] for row in query(lake, asked).to_pylist()] == expected
    drop_part(lake, parts[2])
    ingest_urls(lake, UrlListConfig(path=str(path)), config, round=1)
    assert [row["status"] for row in query(lake, asked).to_pylist()] == expected
