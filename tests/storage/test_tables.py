from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage import layout, tables
from storage.errors import CorruptPart, NotWritable, StaleOutput
from storage.fingerprint import basis_of
from storage.lake import Lake
from storage.schemas import TABLES, conform
from storage.tables import (
    Counts,
    PartRef,
    check_part,
    commit_batches,
    commit_part,
    committed_part,
    drop_part,
    iter_part,
    list_parts,
    part_manifest,
    read_part,
    rows_table,
)

BASIS = basis_of("score", 1, {"threshold": 0.5}, ["in"], "model")


def score_rows(num: int) -> pa.Table:
    rows = [
        {"caption_id": f"{i:032x}", "image_id": "i", "model_id": "m", "status": "ok", "round": 1}
        for i in range(num)
    ]
    return rows_table("scores", rows)


def committed(lake: Lake, num: int = 3, **given: Any) -> PartRef:
    return commit_part(lake, "scores", "p", score_rows(num), round=1, basis=BASIS, **given)


@pytest.mark.parametrize("table", sorted(TABLES))
def test_part_round_trips_with_the_schema_of_its_table(lake: Lake, table: str) -> None:
    values = {
        pa.string(): "x",
        pa.int64(): 7,
        pa.int32(): 7,
        pa.float64(): 0.5,
        pa.bool_(): True,
        pa.binary(): b"\x00bytes",
        pa.timestamp("us", tz="UTC"): 1_700_000_000_000_001,
    }
    row = {f.name: pa.scalar(values[f.type], f.type).as_py() for f in TABLES[table]}
    data = rows_table(table, [row])
    ref = commit_part(lake, table, "p", data, basis=BASIS)
    assert read_part(lake, ref).to_pylist() == [row]
    assert read_part(lake, ref).schema.equals(TABLES[table])


def test_conform_names_the_column_that_is_unknown_or_null() -> None:
    with pytest.raises(ValueError, match="'score'"):
        conform("scores", pa.table({"score": [1.0]}))
    with pytest.raises(ValueError, match="image_id: 2 null"):
        conform("scores", pa.table({"caption_id": ["a", "b"]}))


def test_part_is_not_seen_before_its_manifest(lake: Lake) -> None:
    ref = committed(lake)
    lake.root.remove(layout.part_manifest("scores", "p", 1))
    assert list_parts(lake, "scores") == []
    assert committed_part(lake, "scores", "p", round=1, basis=BASIS) is None
    assert lake.root.exists(ref.path)


def test_part_has_the_same_bytes_when_made_again_from_other_batches(lake: Lake) -> None:
    data = score_rows(200_000)
    first = commit_part(lake, "scores", "p", data, round=1, basis=BASIS)
    before = part_manifest(lake, first)
    batches = data.to_batches(max_chunksize=777)
    second = commit_batches(lake, "scores", "p", batches, round=1, basis=BASIS)
    after = part_manifest(lake, second)
    assert (first, before.sha256, before.num_rows) == (second, after.sha256, 200_000)


def test_committed_part_skips_the_same_and_names_what_differs(lake: Lake) -> None:
    ref = committed(lake)
    assert committed_part(lake, "scores", "p", round=1, basis=BASIS) == ref
    other = basis_of("score", 1, {"threshold": 0.6}, ["in"], "model")
    with pytest.raises(StaleOutput, match=r"config\.threshold: 0\.5 -> 0\.6.*--on-stale rebuild"):
        committed_part(lake, "scores", "p", round=1, basis=other)
    assert committed_part(lake, "scores", "p", round=1, basis=other, on_stale="rebuild") is None


def test_commit_refuses_counts_that_do_not_add_up(lake: Lake) -> None:
    with pytest.raises(AssertionError, match="5 rows in, but 3 ok"):
        committed(lake, counts=Counts(num_in=5, num_ok=3, reasons={"failed": 1}))
    assert list_parts(lake, "scores") == []


def test_iter_part_gives_the_rows_of_read_part_in_pieces(lake: Lake) -> None:
    ref = committed(lake, 1000)
    pieces = list(iter_part(lake, ref, ["caption_id"], batch_rows=64))
    assert len(pieces) == 16
    whole = read_part(lake, ref, ["caption_id"])
    assert pa.Table.from_batches(pieces).to_pylist() == whole.to_pylist()


def test_list_parts_takes_one_round_or_all(lake: Lake) -> None:
    for round in (1, 2):
        commit_part(lake, "scores", "p", score_rows(round), round=round, basis=BASIS)
    assert [(p.round, p.num_rows) for p in list_parts(lake, "scores")] == [(1, 1), (2, 2)]
    assert [p.round for p in list_parts(lake, "scores", 2)] == [2]


@pytest.mark.parametrize("damage", ["truncated", "gone", "emptied"])
def test_read_part_names_the_file_and_the_remedy_when_corrupt(lake: Lake, damage: str) -> None:
    ref = committed(lake)
    data = lake.root.read_bytes(ref.path)
    lake.root.remove(ref.path)
    if damage != "gone":
        lake.root.write_bytes(ref.path, data[:100] if damage == "truncated" else b"")
    for call in (
        lambda: read_part(lake, ref),
        lambda: list_parts(lake, "scores", check=True),
    ):
        with pytest.raises(CorruptPart, match=r"round=0001/p\.parquet.*bootstrap repair"):
            call()


def test_check_part_sees_one_changed_byte_when_full(lake: Lake) -> None:
    ref = committed(lake)
    data = bytearray(lake.root.read_bytes(ref.path))
    data[20] ^= 1
    lake.root.write_bytes(ref.path, bytes(data))
    check_part(lake, ref)
    with pytest.raises(CorruptPart, match="other bytes"):
        check_part(lake, ref, full=True)


def test_read_part_names_the_manifest_when_it_is_torn(lake: Lake) -> None:
    ref = committed(lake)
    lake.root.write_bytes(layout.part_manifest("scores", "p", 1), b"{")
    with pytest.raises(CorruptPart, match=r"p\.json"):
        read_part(lake, ref)


def test_drop_part_leaves_nothing(lake: Lake) -> None:
    drop_part(lake, committed(lake))
    assert lake.root.list_recursive("tables") == []


def test_commit_is_refused_when_read_only(lake: Lake) -> None:
    with pytest.raises(NotWritable, match="read-only"):
        committed(Lake.open(lake.uri, read_only=True))


def test_file_sha256_is_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert tables.file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")
