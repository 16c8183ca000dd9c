"""Pictures that a check refuses are never stored, and a check that fails costs what it fails on."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from web_world import PictureServer, download_config, jpeg, write_list

from storage import ConfigError, Lake, UrlListConfig, ids, ingest_urls, list_parts, query
from storage.intake.safety import Safety
from storage.shards import iter_shard
from storage.tables import part_manifest

ROWS = [
    ("ok90.jpg", "one"),
    ("gone.jpg", "dead"),
    ("ok91.jpg", "two"),
    ("ok91.jpg", "two again"),
    ("ok91.jpg?copy", "two elsewhere"),
    ("ok92.jpg", "three"),
    ("ok93.jpg", "four"),
    ("ok94.jpg", "five"),
]


class Refuses91:
    """Refuses one picture by its pixels."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | None]:
        self.batches.append(len(pictures))
        assert all(each.mode == "RGB" and each.size == (48, 48) for each in pictures)
        return [
            "it is number 91" if _bytes_of(each) == _bytes_of(_picture(91)) else None
            for each in pictures
        ]


def _picture(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(seed))).convert("RGB")


def _bytes_of(picture: Image.Image) -> bytes:
    return picture.tobytes()


def _ingested(
    folder: Path, pictures: PictureServer, judge: Callable, rows: list = ROWS, **changes: object
) -> Lake:
    lake = Lake.open(str(folder / "lake"), create=True)
    path = write_list(folder / "urls.parquet", rows, host="safe.test")
    safety = Safety(id="mine", judge=judge, batch_images=3)
    config = download_config(pictures, safety=safety, texts_per_image=5, **changes)
    ingest_urls(lake, UrlListConfig(path=str(path)), config, round=1)
    return lake


def _statuses(lake: Lake) -> list[str]:
    return [row["status"] for row in query(lake, 'FROM pairs ORDER BY "row"').to_pylist()]


def test_a_refused_picture_and_its_texts_stay_out(tmp_path: Path, pictures: PictureServer) -> None:
    judge = Refuses91()
    lake = _ingested(tmp_path, pictures, judge)
    assert _statuses(lake) == [
        "ok",
        "http_4xx",
        "unsafe",
        "duplicate_url",
        "unsafe",
        "ok",
        "ok",
        "ok",
    ]
    assert judge.batches == [3, 3]
    rows = query(lake, "SELECT reason, shard FROM pairs WHERE status = 'unsafe'").to_pylist()
    assert rows == [{"reason": "it is number 91", "shard": None}] * 2
    gone = ids.image_id(jpeg(91))
    assert not query(lake, "FROM captions WHERE image_id = $id", {"id": gone}).num_rows
    assert query(lake, "FROM captions").num_rows == 4
    stored = {ids.image_id(sample.image) for sample in iter_shard(lake, "web-0001-00-00000")}
    assert len(stored) == 4
    assert gone not in stored
    (part,) = list_parts(lake, "pairs")
    assert part_manifest(lake, part).basis["config"]["safety"] == "mine"
    assert {"outcome": "unsafe", "rows": 2} in query(
        lake, "SELECT outcome, rows FROM funnel WHERE stage = 'fetched'"
    ).to_pylist()


def test_a_picture_that_the_check_fails_on_costs_itself_alone(
    tmp_path: Path, pictures: PictureServer
) -> None:
    def judge(given: Sequence[Image.Image]) -> list[str | None]:
        if any(_bytes_of(each) == _bytes_of(_picture(92)) for each in given):
            raise RuntimeError("cannot be read")
        return [None] * len(given)

    lake = _ingested(tmp_path, pictures, judge)
    assert _statuses(lake).count("unsafe") == 1
    (row,) = query(lake, "SELECT url, reason FROM pairs WHERE status = 'unsafe'").to_pylist()
    assert row["url"].endswith("ok92.jpg")
    assert row["reason"] == "could not be judged: RuntimeError: cannot be read"


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (lambda given: 1 / 0, "ZeroDivisionError"),
        (lambda given: [None], "a reason or None for each of 3 pictures, and said"),
        (lambda given: [True] * len(given), "said .True, True, True."),
    ],
)
def test_a_broken_check_stops_the_intake_and_a_mended_one_goes_on(
    tmp_path: Path, pictures: PictureServer, judge: Callable, words: str
) -> None:
    if words.startswith("a reason"):  # of a single picture this one says enough
        lake = _ingested(tmp_path, pictures, judge)
        assert "unsafe" not in _statuses(lake)
        return
    with pytest.raises(ConfigError, match=rf"check mine failed on each of 3 .*{words}"):
        _ingested(tmp_path, pictures, judge)
    asked = pictures.num_requests
    lake = _ingested(tmp_path, pictures, lambda given: [None] * len(given))
    assert pictures.num_requests == asked, "what is fetched is not fetched again"
    assert _statuses(lake).count("ok") == 5


def test_no_batch_of_nothing() -> None:
    with pytest.raises(ConfigError, match="batch_images must be 1 or more"):
        Safety(id="x", judge=Refuses91(), batch_images=0)
