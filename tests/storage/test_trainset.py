import numpy as np
import pytest
from rounds_of_rows import BASIS, caption, image, pair, write_world

from storage import trainset
from storage.errors import ConfigError, CorruptData, EmptyTrainSet, QueryRefused
from storage.lake import Lake
from storage.tables import commit_part, rows_table
from storage.trainset import TrainRow, build_trainset, open_trainset

RAW = """
SELECT image_id, caption, source FROM raw
UNION ALL
SELECT image_id, caption, source FROM human
"""


def test_trainset_holds_the_rows_in_a_fixed_order(lake: Lake) -> None:
    write_world(lake)
    ref = build_trainset(lake, RAW, name="raw")
    rows = open_trainset(lake, ref)
    assert ref.num_rows == len(rows) == 4
    assert [rows.row(i).image_id for i in range(4)] == [image(i) for i in (0, 1, 3, 9)]
    assert rows.row(2) == TrainRow(
        image_id=image(3), caption="text w3", source="web", shard="s", offset=1536, size=100
    )
    assert list(rows.captions()) == ["text w0", "text w1", "text w3", "text h9"]
    with pytest.raises(IndexError):
        rows.row(4)


def test_trainset_has_one_fingerprint_for_the_same_rows(lake: Lake) -> None:
    write_world(lake)
    ref = build_trainset(lake, RAW, name="raw")
    turned = f"SELECT * FROM ({RAW}) ORDER BY caption DESC"
    assert build_trainset(lake, turned, name="raw") == ref
    fewer = build_trainset(lake, f"FROM ({RAW}) LIMIT 3", name="raw")
    assert fewer.fingerprint != ref.fingerprint


def test_trainset_finds_rows_across_batches(
    local_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainset, "BATCH_ROWS", 7)
    pairs = rows_table("pairs", [pair(i) for i in range(40)])
    commit_part(local_lake, "pairs", "p", pairs, basis=BASIS)
    texts = rows_table("captions", [caption(f"w{i:02}", i, "web", 0) for i in range(40)])
    commit_part(local_lake, "captions", "p", texts, round=0, basis=BASIS)
    rows = open_trainset(local_lake, build_trainset(local_lake, RAW, name="raw"))
    assert [rows.row(i).caption for i in range(40)] == [f"text w{i:02}" for i in range(40)]


def test_trainset_knows_where_images_start_across_batches(
    local_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainset, "BATCH_ROWS", 4)
    pairs = rows_table("pairs", [pair(i) for i in range(9)])
    commit_part(local_lake, "pairs", "p", pairs, basis=BASIS)
    num_texts = [1, 3, 2, 2, 5, 9, 1, 1, 4]
    texts = [
        caption(f"{i}-{n}", i, "web", 0) for i, num in enumerate(num_texts) for n in range(num)
    ]
    commit_part(local_lake, "captions", "p", rows_table("captions", texts), round=0, basis=BASIS)
    rows = open_trainset(local_lake, build_trainset(local_lake, RAW, name="raw"))
    starts = rows.image_starts()
    assert starts.tolist() == [sum(num_texts[:i]) for i in range(9)]
    assert starts.dtype == np.uint32
    for start, num in zip(starts.tolist(), num_texts, strict=True):
        assert rows.values("image_id", start, start + num) == [rows.row(start).image_id] * num
    everything = [rows.row(i).caption for i in range(len(rows))]
    assert rows.values("caption", 2, 27) == everything[2:27]
    assert rows.distinct("image_id") == [image(i) for i in range(9)]
    wanted = [image(4), image(8)]
    found = [rows.row(i).image_id in wanted for i in range(len(rows))]
    assert rows.is_one_of("image_id", wanted).tolist() == found


def test_trainset_refuses_held_out_and_unknown_images(lake: Lake) -> None:
    write_world(lake)
    everything = "SELECT image_id, caption, source FROM captions WHERE source = 'web'"
    with pytest.raises(ConfigError, match="of 4 rows, 1 show held-out or canary images"):
        build_trainset(lake, everything, name="leak")
    unknown = "SELECT 'nowhere' AS image_id, 'x' AS caption, 'web' AS source"
    with pytest.raises(ConfigError, match="1 images that are not stored"):
        build_trainset(lake, unknown, name="unknown")


def test_trainset_says_so_when_it_has_no_row(lake: Lake) -> None:
    with pytest.raises(EmptyTrainSet, match=r"clean.*funnel"):
        build_trainset(lake, "SELECT image_id, caption, source FROM clean", name="clean")


def test_trainset_refuses_a_query_that_writes_or_lacks_columns(lake: Lake) -> None:
    with pytest.raises(QueryRefused, match="DROP"):
        build_trainset(lake, "DROP VIEW raw", name="x")
    with pytest.raises(QueryRefused, match="caption"):
        build_trainset(lake, "SELECT image_id FROM raw", name="x")


def test_open_trainset_names_the_file_when_changed_or_gone(lake: Lake) -> None:
    write_world(lake)
    ref = build_trainset(lake, RAW, name="raw")
    data = lake.root.read_bytes(ref.path)
    lake.root.write_bytes(ref.path, data[:-1])
    with pytest.raises(CorruptData, match=ref.fingerprint):
        open_trainset(lake, ref)
