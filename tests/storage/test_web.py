import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from intake_runs import processes_of
from PIL import Image
from web_world import PictureServer, WebLake, download_config, jpeg, write_list

import storage
from storage import layout, repair
from storage.catalog import query
from storage.errors import EmptyInput, MissingColumn, StaleOutput
from storage.intake import web
from storage.intake.download_config import DownloadConfig
from storage.intake.plan import Plan
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.shards import read_verified_image
from storage.tables import part_manifest

SCRIPT = """
import sys
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake
lake, urls, proxy = sys.argv[1:]
config = DownloadConfig(
    http_proxy=proxy,
    shard_rows=10,
    threads=2,
    min_image_side_px=8,
    max_image_bytes=200_000,
    robots="ignore",
    retry_passes=0,
)
ingest_urls(Lake.open(lake, create=True), UrlListConfig(path=urls), config, round=1)
"""


def rows_of(lake: Lake, table: str) -> list[dict[str, object]]:
    """All rows but for the one column that may differ between runs."""
    rows = query(lake, f"SELECT * FROM {table} ORDER BY ALL").to_pylist()
    return [{k: v for k, v in row.items() if k != "fetched_at"} for row in rows]


def test_ingest_gives_every_row_one_outcome(web_lake: WebLake) -> None:
    rows = query(web_lake.lake, "SELECT row, status FROM pairs ORDER BY row").to_pylist()
    expected = [
        "http_4xx",
        "http_5xx",
        "not_an_image",
        "decode_error",
        "opted_out",
        "too_large",
        "too_small",
        "timeout",
        "ok",
        "duplicate_url",
        "duplicate_image",
        *["ok"] * 14,
        "bad_url",
        "bad_url",
    ]
    assert [(r["row"], r["status"]) for r in rows] == list(enumerate(expected))
    manifests = [part_manifest(web_lake.lake, p) for p in web_lake.parts if p.table == "pairs"]
    assert [(m.num_in, m.num_ok) for m in manifests] == [(10, 1), (10, 9), (7, 5)]
    why = query(web_lake.lake, "SELECT status, reason FROM pairs WHERE status <> 'ok'").to_pylist()
    assert all(r["reason"] for r in why)


def test_ingest_stores_the_served_bytes_where_the_row_says(
    web_lake: WebLake, pictures: PictureServer
) -> None:
    rows = query(web_lake.lake, "FROM pairs WHERE status = 'ok'").to_pylist()
    assert len(rows) == 15
    for row in rows:
        where = (row["shard"], row["offset"], row["size"])
        data = read_verified_image(web_lake.lake, *where, row["image_id"])
        seed = int(row["url"].rpartition("/ok")[2].split(".")[0])
        assert data == jpeg(seed)
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])
        assert row["extra"] == f'{{"width_hint": {row["row"]}}}'


def test_ingest_proposes_the_alt_text_of_every_image_that_has_one(web_lake: WebLake) -> None:
    rows = query(web_lake.lake, "SELECT caption FROM raw ORDER BY 1").to_pylist()
    assert {r["caption"] for r in rows} == {"picture one", *(f"picture {i}" for i in range(3, 16))}
    texts = [p for p in web_lake.parts if p.table == "captions"]
    assert sum(part_manifest(web_lake.lake, p).reasons.get("no_text", 0) for p in texts) == 1


def test_ingest_asks_for_each_address_once(web_lake: WebLake, pictures: PictureServer) -> None:
    asked = {
        k: n for k, n in pictures.requests.items() if "pictures.test" in k and "?dead" not in k
    }
    assert asked
    assert set(asked.values()) == {1}
    assert not any("hostname" in path for path in pictures.requests)


def test_ingest_reports_progress_up_to_the_end(web_lake: WebLake) -> None:
    assert web_lake.progress[-1] == (27, 27)
    assert [done for done, _ in web_lake.progress] == sorted(d for d, _ in web_lake.progress)
    assert len(web_lake.progress) > 2


def test_ingest_leaves_no_scratch_and_no_process(web_lake: WebLake) -> None:
    assert web_lake.lake.root.list_recursive("work/ingest") == []
    assert processes_of(web_lake.lake.uri) == []


def test_ingest_does_nothing_the_second_time(web_lake: WebLake, pictures: PictureServer) -> None:
    before = pictures.num_requests
    again = ingest_urls(web_lake.lake, web_lake.url_list, web_lake.config, round=1)
    assert again == web_lake.parts
    assert pictures.num_requests == before


def test_ingest_takes_nothing_in_when_a_later_round_knows_every_row(
    web_lake: WebLake, pictures: PictureServer
) -> None:
    before = pictures.num_requests
    assert ingest_urls(web_lake.lake, web_lake.url_list, web_lake.config, round=9) == []
    assert pictures.num_requests == before
    web_lake.lake.root.remove(layout.intake_record(9, "web"))


def test_ingest_names_what_changed_within_a_round(web_lake: WebLake, tmp_path: Path) -> None:
    changed = download_config(PictureServer(), min_image_side_px=9)
    with pytest.raises(StaleOutput, match=r"min_image_side_px: 8 -> 9.*--new-round"):
        ingest_urls(web_lake.lake, web_lake.url_list, changed, round=1)
    other = UrlListConfig(path=str(write_list(tmp_path / "o.parquet", [("ok1.jpg", "x")])))
    with pytest.raises(StaleOutput, match=r"list [0-9a-f]+ -> list"):
        ingest_urls(web_lake.lake, other, web_lake.config, round=1)


def test_ingest_refuses_a_list_without_the_column(local_lake: Lake, tmp_path: Path) -> None:
    path = write_list(tmp_path / "urls.parquet", [("ok1.jpg", "x")])
    config = UrlListConfig(path=str(path), url_column="link")
    with pytest.raises(MissingColumn, match="'link'; it has url, alt_text, width_hint"):
        ingest_urls(local_lake, config, download_config(PictureServer()), round=1)


def test_ingest_keeps_the_rows_and_tries_again_when_every_url_is_dead(
    local_lake: Lake, pictures: PictureServer, tmp_path: Path
) -> None:
    rows = [("file:///etc/passwd", "a"), ("mailto:x@y", "b"), ("gone.jpg?dead", "c")]
    url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows)))
    for asked in (1, 2):
        with pytest.raises(
            EmptyInput, match=r"none of its 3 URLs gave an image \(bad_url 2, http_4xx 1\)"
        ):
            ingest_urls(local_lake, url_list, download_config(pictures), round=1)
        assert query(local_lake, "FROM pairs").num_rows == 3
        assert pictures.requests["http://pictures.test/gone.jpg?dead"] == asked


def test_ingest_tells_an_all_dead_list_in_a_later_round_from_one_that_it_knows(
    local_lake: Lake, pictures: PictureServer, tmp_path: Path
) -> None:
    config, path = download_config(pictures), tmp_path / "urls.parquet"
    url_list = UrlListConfig(path=str(write_list(path, [("ok1.jpg", "one")], host="two.test")))
    ingest_urls(local_lake, url_list, config, round=1)
    rows = [("gone.jpg", "a"), ("broken.jpg", "b"), ("ok1.jpg", "uno")]
    write_list(path, rows, host="two.test")
    said = r"none of its 3 URLs gave an image \(.*http_4xx 1"
    for asked in (1, 2):
        with pytest.raises(EmptyInput, match=said):
            ingest_urls(local_lake, url_list, config, round=2)
        assert pictures.requests["http://two.test/gone.jpg"] == asked
    write_list(path, rows[2:], host="two.test")
    parts = ingest_urls(local_lake, url_list, config, round=2, on_stale="rebuild")
    assert [part_manifest(local_lake, p).reasons for p in parts] == [{"duplicate_url": 1}, {}]


class Interrupted(Exception):
    """What a test ends an intake with."""


def _interrupted(lake: Lake, url_list: UrlListConfig, config: DownloadConfig, after: int) -> None:
    """Begin an intake and break it off once more than `after` rows are done or under way."""

    def stop(done: int, num: int) -> None:
        if done > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        ingest_urls(lake, url_list, config, round=1, on_progress=stop)


def _statuses(lake: Lake) -> dict[str, int]:
    rows = query(lake, "SELECT status, count(*) AS n FROM pairs GROUP BY status").to_pylist()
    return {row["status"]: row["n"] for row in rows}


def test_ingest_resumed_with_larger_slices_fetches_every_row(
    local_lake: Lake, pictures: PictureServer, tmp_path: Path
) -> None:
    rows = [(f"ok{i}.jpg", f"text {i}") for i in range(30)]
    url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows, host="s.test")))
    _interrupted(local_lake, url_list, download_config(pictures, slice_rows=10), after=-1)
    ingest_urls(local_lake, url_list, download_config(pictures, slice_rows=100), round=1)
    assert _statuses(local_lake) == {"ok": 30}


def test_ingest_fetches_what_was_dropped_since_its_slice_was_begun(
    local_lake: Lake, pictures: PictureServer, tmp_path: Path
) -> None:
    rows = [(f"ok{i}.jpg", f"text {i}") for i in range(20)]
    url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows, host="d.test")))
    _interrupted(local_lake, url_list, download_config(pictures, slice_rows=10), after=10)
    config = download_config(pictures, slice_rows=20)
    _interrupted(local_lake, url_list, config, after=-1)
    assert _statuses(local_lake) == {"ok": 10}, "the slice was begun with half of it committed"
    local_lake.root.remove(layout.shard("web-0001-00-00000"))
    assert [Path(damage.path).name for damage in repair.repair(local_lake)] == [
        "web-0001-00-00000.tar"
    ]
    ingest_urls(local_lake, url_list, config, round=1)
    assert _statuses(local_lake) == {"ok": 20}


def test_ingest_after_kill_gives_the_tables_of_an_undisturbed_run(
    tmp_path: Path, pictures: PictureServer
) -> None:
    rows = [(f"ok{i % 110}.jpg?v={i}", f"text {i}") for i in range(120)]
    path = write_list(tmp_path / "urls.parquet", rows, host="killed.test")
    disturbed = Lake.open(str(tmp_path / "a"), create=True)
    home = str(Path(storage.__file__).parents[1])
    pictures.delay_s = 0.05
    before = pictures.num_requests
    try:
        run = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, disturbed.uri, str(path), pictures.proxy],
            env=os.environ | {"PYTHONPATH": home},
        )
        while pictures.num_requests < before + 60:
            assert run.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        ends_by = time.monotonic() + 20
        while processes_of(disturbed.uri) and time.monotonic() < ends_by:
            time.sleep(0.05)
        assert processes_of(disturbed.uri) == [], "img2dataset outlived the process that ran it"
    finally:
        pictures.delay_s = 0.0
    assert query(disturbed, "FROM pairs").num_rows < 120
    url_list = UrlListConfig(path=str(path))
    config = download_config(pictures, texts_per_image=5)
    asked = pictures.num_requests
    ingest_urls(disturbed, url_list, config, round=1)
    assert pictures.num_requests - asked < 120, "finished shards were fetched again"
    undisturbed = Lake.open(str(tmp_path / "b"), create=True)
    ingest_urls(undisturbed, url_list, config, round=1)
    for table in ("pairs", "captions"):
        assert rows_of(disturbed, table) == rows_of(undisturbed, table)
    for rel in undisturbed.root.list_recursive("shards"):
        assert disturbed.root.read_bytes(rel) == undisturbed.root.read_bytes(rel)
    duplicates = query(disturbed, "FROM pairs WHERE status = 'duplicate_image'")
    assert duplicates.num_rows == 10
    brought = query(
        disturbed,
        "FROM captions c SEMI JOIN pairs p ON p.status = 'duplicate_image' AND p.alt_text = c.caption",
    )
    assert brought.num_rows == 10, "a copy's text is a caption of its picture"
    _damage_and_repair(disturbed, url_list, config, pictures)


def _damage_and_repair(
    lake: Lake, url_list: UrlListConfig, config: DownloadConfig, pictures: PictureServer
) -> None:
    """A torn shard and a torn part are named, dropped, and fetched again; the rest stays."""
    whole = {table: rows_of(lake, table) for table in ("pairs", "captions")}
    shard = layout.shard("web-0001-00-00003")
    lake.root.write_bytes(shard, lake.root.read_bytes(shard)[:5000])
    lake.root.write_bytes("tables/captions/round=0000/web-0001-00-00007.parquet", b"")
    dropped = repair.repair(lake)
    assert {d.path for d in dropped} == {
        shard,
        "tables/captions/round=0000/web-0001-00-00007.parquet",
    }
    assert all(Path(d.path).name in d.why for d in dropped)
    assert query(lake, "FROM pairs").num_rows == 110
    before = pictures.num_requests
    ingest_urls(lake, url_list, config, round=1)
    assert pictures.num_requests - before == 20
    assert {table: rows_of(lake, table) for table in whole} == whole


def test_later_round_adds_what_is_new(tmp_path: Path, pictures: PictureServer) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = download_config(pictures, image_size_px=32, shard_rows=4)
    first = [("ok1.jpg", "one"), ("ok2.jpg", "two"), ("tiny.jpg", "tiny")]
    path = tmp_path / "urls.parquet"
    url_list = UrlListConfig(path=str(write_list(path, first, host="later.test")))
    ingest_urls(lake, url_list, config, round=1)
    write_list(path, [*first, ("ok1.jpg", "uno"), ("ok3.jpg", "three")], host="later.test")
    parts = ingest_urls(lake, url_list, config, round=2)
    assert [p.name for p in parts] == ["web-0002-00-00000", "web-0002-00-00000"]
    rows = query(lake, "SELECT alt_text, status, width FROM pairs ORDER BY row").to_pylist()
    assert [(r["alt_text"], r["status"], r["width"]) for r in rows] == [
        ("one", "ok", 32),
        ("two", "ok", 32),
        ("tiny", "too_small", None),
        ("uno", "duplicate_url", None),
        ("three", "ok", 32),
    ]


def test_a_part_is_packed_while_its_slice_is_being_fetched(
    pictures: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"ok{i}.jpg" for i in range(70, 80)] + [f"held{i}.jpg" for i in range(80, 85)]
    rows = [(name, f"picture {name}") for name in names]
    listed = write_list(tmp_path / "urls.parquet", rows, host="packed.test")
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = download_config(pictures, shard_rows=5, threads=2, timeout_s=30.0)
    packed = web._Intake._part

    def part(self: web._Intake, plan: Plan, index: int, *rest: Any) -> Any:
        made = packed(self, plan, index, *rest)
        if index == 1:
            pictures.released.set()
        return made

    monkeypatch.setattr(web._Intake, "_part", part)
    ingest_urls(lake, UrlListConfig(path=str(listed)), config, round=1)
    # Held pictures are answered when what was there before them is packed, and time out otherwise.
    assert [row["status"] for row in rows_of(lake, "pairs")] == ["ok"] * 15


def test_a_part_with_a_failure_that_may_pass_waits_until_it_was_asked_again(
    pictures: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(name, "text") for name in ("ok90.jpg", "broken.jpg", "ok91.jpg", "gone.jpg")]
    listed = write_list(tmp_path / "urls.parquet", rows, host="again.test")
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = download_config(pictures, shard_rows=2, retry_passes=1, retry_wait_s=1.0)
    packed, asked = web._Intake._part, []

    def part(self: web._Intake, plan: Plan, index: int, *rest: Any) -> Any:
        asked.append(pictures.requests["http://again.test/broken.jpg"])
        return packed(self, plan, index, *rest)

    monkeypatch.setattr(web._Intake, "_part", part)
    ingest_urls(lake, UrlListConfig(path=str(listed)), config, round=1)
    assert asked == [2, 2], "the second part is settled at once, and has its turn after the first"
    found = query(lake, "SELECT status, attempts FROM pairs ORDER BY row").to_pylist()
    assert [(row["status"], row["attempts"]) for row in found] == [
        ("ok", 1),
        ("http_5xx", 2),
        ("ok", 1),
        ("http_4xx", 1),
    ]


def test_the_next_slice_is_fetched_while_one_is_packed_and_ends_with_an_error(
    pictures: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"ok{i}.jpg", f"picture {i}") for i in range(40, 60)]
    listed = write_list(tmp_path / "urls.parquet", rows, host="slices.test")
    url_list = UrlListConfig(path=str(listed))
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = download_config(pictures, shard_rows=5, slice_rows=5, threads=1)
    packed = web._Intake._part

    def part(self: web._Intake, plan: Plan, index: int, *rest: Any) -> Any:
        if index == 1:
            until = time.monotonic() + 60
            while not any(pictures.requests[f"http://slices.test/{row}"] for row, _ in rows[10:]):
                assert time.monotonic() < until, "nothing of the third slice was asked for"
                time.sleep(0.02)
            raise RuntimeError("packing broke")
        return packed(self, plan, index, *rest)

    monkeypatch.setattr(web._Intake, "_part", part)
    monkeypatch.setattr(pictures, "delay_s", 0.3)
    with pytest.raises(RuntimeError, match="packing broke"):
        ingest_urls(lake, url_list, config, round=1)
    assert processes_of(lake.uri) == []
    monkeypatch.undo()
    ingest_urls(lake, url_list, config, round=1)
    assert [row["status"] for row in rows_of(lake, "pairs")] == ["ok"] * 20
