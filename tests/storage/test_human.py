import json
from dataclasses import replace
from pathlib import Path

import pytest
from web_world import jpeg

from storage.catalog import query
from storage.errors import ConfigError, EmptyInput, MissingColumn, StaleOutput
from storage.intake.human import CaptionSetConfig, ingest_captions
from storage.lake import Lake
from storage.shards import read_verified_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files: five pictures, a copy of the first, and one that is no picture."""
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "5.jpg").write_bytes(jpeg(0))
    (tmp_path / "6.jpg").write_bytes(b"<html>")
    return tmp_path


def coco(folder: Path, num_captions: int = 14) -> CaptionSetConfig:
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(7)],
        "annotations": [
            {"id": k, "image_id": 10 + k % 7, "caption": f" text {k} "} for k in range(num_captions)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return CaptionSetConfig(
        captions=str(folder / "captions.json"),
        images=str(folder),
        pool="human",
        name="coco",
        shard_images=3,
    )


def test_ingest_captions_gives_each_picture_a_row_and_each_text_a_caption(
    lake: Lake, folder: Path
) -> None:
    config = coco(folder)
    parts = ingest_captions(lake, config)
    assert [p.name for p in parts if p.table == "pairs"] == [
        f"human-coco-0000{i}" for i in range(3)
    ]
    pairs = query(lake, "FROM pairs ORDER BY row").to_pylist()
    assert [p["status"] for p in pairs] == ["ok"] * 5 + ["duplicate_image", "not_an_image"]
    for pair in pairs[:5]:
        data = read_verified_image(
            lake, pair["shard"], pair["offset"], pair["size"], pair["image_id"]
        )
        assert data == (folder / pair["url"]).read_bytes()
    # The copy's texts belong to the picture; the texts of what is no picture have none.
    captions = query(lake, "SELECT caption FROM human ORDER BY 1").to_pylist()
    assert len(captions) == 12
    assert {"caption": "text 5"} in captions
    assert {"caption": "text 6"} not in captions


def test_ingest_captions_does_nothing_the_second_time(lake: Lake, folder: Path) -> None:
    parts = ingest_captions(lake, coco(folder))
    for path in folder.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[::-1])  # same sizes: reading them again would fail
    assert ingest_captions(lake, coco(folder)) == parts


def test_ingest_captions_goes_on_where_it_was_killed(lake: Lake, folder: Path) -> None:
    whole = ingest_captions(lake, coco(folder))
    rows = query(lake, "FROM pairs ORDER BY row").to_pylist()
    lake.root.remove("rounds/0000/intake-human-coco.json")
    lake.root.remove("tables/pairs/human-coco-00001.json")
    assert ingest_captions(lake, coco(folder)) == whole
    assert query(lake, "FROM pairs ORDER BY row").to_pylist() == rows


def test_ingest_captions_names_what_changed(lake: Lake, folder: Path) -> None:
    ingest_captions(lake, coco(folder))
    with pytest.raises(StaleOutput, match=r"captions [0-9a-f]+ -> captions"):
        ingest_captions(lake, coco(folder, num_captions=7))
    ingest_captions(lake, coco(folder, num_captions=7), on_stale="rebuild")
    assert query(lake, "FROM captions").num_rows == 6


def test_karpathy_file_gives_the_chosen_splits(local_lake: Lake, folder: Path) -> None:
    images = [
        {
            "filename": f"{i}.jpg",
            "filepath": "",
            "split": "test" if i < 2 else "train",
            "sentences": [{"raw": f"a {i}"}, {"raw": f"b {i}"}],
        }
        for i in range(5)
    ]
    (folder / "karpathy.json").write_text(json.dumps({"dataset": "x", "images": images}))
    config = CaptionSetConfig(
        captions=str(folder / "karpathy.json"),
        images=str(folder),
        pool="heldout",
        name="test",
        splits=("test",),
    )
    ingest_captions(local_lake, config)
    assert query(local_lake, "FROM heldout").num_rows == 4
    assert query(local_lake, "FROM human").num_rows == 0


def test_table_gives_pictures_in_the_order_of_their_first_row(
    local_lake: Lake, folder: Path
) -> None:
    (folder / "t.csv").write_text("file,text\n1.jpg,one\n0.jpg,zero\n1.jpg,uno\n2.jpg,\n")
    config = CaptionSetConfig(
        captions=str(folder / "t.csv"),
        images=str(folder),
        pool="human",
        name="t",
        image_column="file",
        caption_column="text",
    )
    ingest_captions(local_lake, config)
    urls = query(local_lake, "SELECT url FROM pairs ORDER BY row").to_pylist()
    assert urls == [{"url": "1.jpg"}, {"url": "0.jpg"}]
    with pytest.raises(MissingColumn, match=r"t\.csv has no column 'caption'; it has file, text"):
        ingest_captions(local_lake, replace(config, name="u", caption_column="caption"))


def test_absent_pictures_are_counted_and_the_first_named(local_lake: Lake, folder: Path) -> None:
    config = coco(folder)
    for i in range(1, 6):
        (folder / f"{i}.jpg").unlink()
    with pytest.raises(ConfigError, match=r"names 5 of 7 pictures.*1\.jpg, 2\.jpg, 3\.jpg, \.\.\."):
        ingest_captions(local_lake, config)
    assert local_lake.root.list_recursive("tables") == []


def test_zero_pairs_are_refused(local_lake: Lake, folder: Path) -> None:
    with pytest.raises(EmptyInput, match="no pair of a picture and a caption"):
        ingest_captions(local_lake, coco(folder, num_captions=0))
    (folder / "bad.csv").write_text("image,caption\n6.jpg,a text\n")
    bad = replace(coco(folder), captions=str(folder / "bad.csv"), name="bad")
    with pytest.raises(EmptyInput, match="none of its 1 pictures could be read"):
        ingest_captions(local_lake, bad)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b'{"x": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "neither COCO"),
        (b'{"images": [{"name": 1}], "annotations": []}', "shape of a coco"),
        (b'{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "names image 3"),
    ],
)
def test_malformed_captions_json_is_named(
    local_lake: Lake, folder: Path, content: bytes, words: str
) -> None:
    (folder / "captions.json").write_bytes(content)
    config = CaptionSetConfig(
        captions=str(folder / "captions.json"), images=str(folder), pool="human", name="x"
    )
    with pytest.raises(ConfigError, match=words):
        ingest_captions(local_lake, config)


def test_config_names_the_field_that_is_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"name must be letters.*'a/b'"):
        CaptionSetConfig(captions="c", images="i", pool="human", name="a/b")
