"""What was purged is not taken in again: not its address, not its bytes, and nothing of a host that was purged."""

import json
from pathlib import Path

import pytest
from web_world import PictureServer, download_config, jpeg, write_list

from storage import CaptionSetConfig, ids, ingest_captions, ingest_urls, query
from storage.intake.url_list import UrlListConfig
from storage.lake import Lake
from storage.purge import Request, asked_host, asked_image, asked_url, purge

FIRST = [
    *[(f"ok{number}.jpg", f"picture {number}") for number in range(20, 26)],
    ("http://img.away.test/gone.jpg", "a dead link of a host"),
]


def rows_of_round(lake: Lake, shard: str) -> list[dict[str, object]]:
    part = next(p for p in _pairs(lake) if p.name.startswith(shard))
    from storage import read_part

    return read_part(lake, part).to_pylist()


def _pairs(lake: Lake) -> list:
    from storage import list_parts

    return list_parts(lake, "pairs")


@pytest.fixture(scope="module")
def later(
    tmp_path_factory: pytest.TempPathFactory, pictures: PictureServer
) -> tuple[Lake, int, int]:
    """A lake that took in a list, was purged, and took in another one; requests before and after the second."""
    folder = tmp_path_factory.mktemp("purged")
    lake = Lake.open(str(folder / "lake"), create=True)
    config = download_config(pictures)
    first = UrlListConfig(path=str(write_list(folder / "first.parquet", FIRST)))
    ingest_urls(lake, first, config, round=1)
    asked = (
        asked_url("HTTP://Pictures.test:80/ok20.jpg#x"),
        asked_image(ids.image_id(jpeg(21))),
        asked_host("away.test"),
    )
    purge(lake, Request(asked=asked, because="asked by mail"))
    again = ingest_urls(lake, first, config, round=1)
    assert [part.name for part in again if part.table == "pairs"], "found, not made anew"
    more = [
        ("ok20.jpg", "another text of a purged address"),
        ("https://pictures.test/ok20.jpg", "the same in another spelling"),
        ("ok21.jpg?elsewhere", "purged bytes under a new address"),
        ("http://new.away.test/ok22.jpg", "a new address of a purged host"),
        ("http://noaway.test/ok27.jpg", "of another host"),
        ("ok26.jpg", "new"),
        *FIRST,
    ]
    before = pictures.num_requests
    second = UrlListConfig(path=str(write_list(folder / "second.parquet", more)))
    ingest_urls(lake, second, config, round=2)
    return lake, before, pictures.num_requests


def test_later_list_has_the_outcome_purged_for_address_bytes_and_host(
    later: tuple[Lake, int, int],
) -> None:
    lake, _, _ = later
    rows = rows_of_round(lake, "web-0002")
    found = {row["url"]: row["status"] for row in rows}
    assert found == {
        "http://pictures.test/ok20.jpg": "purged",
        "https://pictures.test/ok20.jpg": "purged",
        "http://pictures.test/ok21.jpg?elsewhere": "purged",
        "http://new.away.test/ok22.jpg": "purged",
        "http://noaway.test/ok27.jpg": "ok",
        "http://pictures.test/ok26.jpg": "ok",
    }
    for row in rows:
        if row["status"] == "purged":
            assert row["reason"] == "asked by mail"
            assert (row["alt_text"], row["extra"], row["shard"], row["phash"]) == (None,) * 4
    tar = lake.root.read_bytes("shards/web-0002-00-00000.tar")
    assert jpeg(21) not in tar
    assert b"purged bytes" not in tar


def test_later_list_asks_for_nothing_that_was_purged(
    later: tuple[Lake, int, int], pictures: PictureServer
) -> None:
    _, before, after = later
    assert after - before == 3, "two new ones, and the bytes that nobody could know before"


def test_purged_people_s_picture_is_not_taken_in_with_another_set(
    later: tuple[Lake, int, int], tmp_path: Path
) -> None:
    lake, _, _ = later
    for name, seed in (("a.jpg", 21), ("b.jpg", 99)):
        (tmp_path / name).write_bytes(jpeg(seed))
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"id": n, "image_id": n, "caption": f"a person on {n}"} for n in (1, 2)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    config = CaptionSetConfig(
        captions=str(tmp_path / "captions.json"), images=str(tmp_path), pool="human", name="late"
    )
    ingest_captions(lake, config)
    rows = query(lake, "SELECT url, status, reason FROM pairs WHERE pool = 'human' ORDER BY url")
    assert [tuple(row.values()) for row in rows.to_pylist()] == [
        ("a.jpg", "purged", "asked by mail"),
        ("b.jpg", "ok", None),
    ]
    texts = query(lake, "SELECT caption FROM captions WHERE source = 'human'").to_pylist()
    assert texts == [{"caption": "a person on 2"}]
