"""A lake on an S3-compatible server: the same as on a disk, and clear words when it cannot be had."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs
from hostile_web import HostileWeb, serve
from object_store import CREDENTIALS, ObjectStore, object_store
from test_adopting import image_set, tars
from test_faults import assert_same
from test_lake import HOLDER
from web_world import jpeg, write_list

import storage
from storage import layout, lock
from storage.catalog import query, write_catalog
from storage.errors import (
    LakeBusy,
    LakeNotFound,
    NoAccess,
    QueryRefused,
    StorageError,
    TransientError,
)
from storage.fingerprint import basis_of
from storage.intake.adopting.adopt import adopt_images
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig, open_table
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.repair import repair
from storage.shards import Sample, iter_shard, read_verified_image, write_shard
from storage.tables import PartRef, commit_part, list_parts, read_part, rows_table

CONFIG = DownloadConfig(allow_addresses=("127.0.0.1/32",), shard_rows=10, retry_passes=0, threads=4)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store("bucket") as served:
        yield served


@pytest.fixture(autouse=True)
def environment(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BOOTSTRAP_SCRATCH", str(tmp_path / "scratch"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def web() -> Iterator[HostileWeb]:
    with serve() as served:
        yield served


@dataclass(frozen=True)
class TwoLakes:
    """One list, taken into a lake on the store and into one on a disk."""

    url_list: UrlListConfig
    lake: Lake
    on_disk: Lake
    parts: list[PartRef]


@pytest.fixture(scope="module")
def both(store: ObjectStore, web: HostileWeb, tmp_path_factory: pytest.TempPathFactory) -> TwoLakes:
    folder = tmp_path_factory.mktemp("both")
    pages = [f"ok.jpg?n={n % 18}&row={n}" for n in range(20)] + ["html.jpg", "none.jpg"]
    path = write_list(folder / "urls.parquet", [(web.url(p), f"text of {p}") for p in pages])
    lake = Lake.open(
        "s3://bucket/both",
        create=True,
        storage_options=store.options,
        scratch_root=folder / "scratch",
    )
    on_disk = Lake.open(str(folder / "lake"), create=True)
    url_list = UrlListConfig(path=str(path))
    with lake.lock("ingest"):
        parts = ingest_urls(lake, url_list, CONFIG, round=1)
    ingest_urls(on_disk, url_list, CONFIG, round=1)
    return TwoLakes(url_list, lake, on_disk, parts)


def test_intake_gives_the_lake_that_a_disk_gets(both: TwoLakes) -> None:
    assert_same(both.lake, both.on_disk)
    assert not both.lake.root.exists(layout.LOCK)
    funnel = "SELECT stage, outcome, rows FROM funnel ORDER BY ALL"
    assert query(both.lake, funnel) == query(both.on_disk, funnel)
    assert write_catalog(both.lake) is None


def test_tars_and_lists_on_the_store_are_taken_in(
    store: ObjectStore, web: HostileWeb, tmp_path: Path
) -> None:
    fs = s3fs.S3FileSystem(**store.options)
    for path in tars(tmp_path / "set", num=2).iterdir():
        fs.put_file(str(path), f"bucket/sets/mine/{path.name}")
    pages = [("ok.jpg?n=900", "nine hundred"), ("ok.jpg?n=901", "nine hundred and one")]
    listed = write_list(tmp_path / "urls.parquet", [(web.url(page), text) for page, text in pages])
    fs.put_file(str(listed), "bucket/lists/part-0.parquet")
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    config = DownloadConfig(allow_addresses=("127.0.0.1/32",), retry_passes=0)
    adopt_images(lake, image_set("s3://bucket/sets/mine"), config, round=1)
    ingest_urls(lake, UrlListConfig(path="s3://bucket/lists/part-*.parquet"), config, round=1)
    pairs = query(lake, "FROM pairs WHERE status = 'ok'").to_pylist()
    assert sorted(pair["source_name"] for pair in pairs) == ["mine"] * 8 + ["web"] * 2
    for pair in pairs:
        where = (pair["shard"], pair["offset"], pair["size"])
        assert len(read_verified_image(lake, *where, pair["image_id"])) == pair["size"]
    with pytest.raises(LakeNotFound, match=r"s3://nowhere/set.*no such bucket"):
        adopt_images(lake, image_set("s3://nowhere/set"), config, round=2)


def test_images_are_read_by_their_ranges(both: TwoLakes) -> None:
    rows = query(both.lake, "FROM pairs WHERE status = 'ok'").to_pylist()
    assert len(rows) == 18
    for row in rows:
        where = (row["shard"], row["offset"], row["size"])
        number = int(row["url"].partition("?n=")[2].partition("&")[0])
        assert read_verified_image(both.lake, *where, row["image_id"]) == jpeg(number)


def test_intake_is_not_made_twice_and_its_list_may_be_on_the_store(both: TwoLakes) -> None:
    s3fs.S3FileSystem().put_file(both.url_list.path, "bucket/urls.parquet")
    listed = UrlListConfig(path="s3://bucket/urls.parquet")
    assert ingest_urls(both.lake, listed, CONFIG, round=1) == both.parts
    read = [row.values for batch in open_table(listed.path, listed.columns()) for row in batch]
    assert len(read) == 22


def test_parts_and_shards_are_read_dropped_and_repaired(both: TwoLakes) -> None:
    lake = both.lake
    tables = [read_part(lake, ref) for ref in list_parts(lake, "pairs", check=True)]
    assert [table.num_rows for table in tables] == [10, 10, 2]
    assert len(list(iter_shard(lake, "web-0001-00-00000"))) == 10
    shard = layout.shard("web-0001-00-00001")
    lake.root.write_bytes(shard, lake.root.read_bytes(shard)[:3000])
    lake.root.write_bytes("tables/_tmp-unfinished", b"x")
    assert [damage.path for damage in repair(lake)] == [shard]
    assert not lake.root.exists("tables/_tmp-unfinished")
    assert query(lake, "FROM pairs").num_rows == 12
    ingest_urls(lake, both.url_list, CONFIG, round=1)
    assert_same(lake, both.on_disk)


def test_queries_of_strangers_read_no_file_of_this_machine(tmp_path: Path) -> None:
    lake = Lake.open("s3://bucket/fenced", create=True)
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with pytest.raises(QueryRefused, match="disabled"):
        query(lake, f"FROM read_csv('{secret}')")


def test_what_another_process_writes_is_seen(store: ObjectStore) -> None:
    mine = Lake.open("s3://bucket/shared", create=True)
    assert mine.root.list("reports") == []
    assert not mine.root.exists("reports/a")
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file("bucket/shared/reports/a", b"one")
    assert mine.root.list("reports") == ["a"]
    assert mine.root.size("reports/a") == 3
    other.pipe_file("bucket/shared/reports/a", b"three")
    assert mine.root.size("reports/a") == 5
    other.rm_file("bucket/shared/reports/a")
    assert not mine.root.exists("reports/a")


def test_lock_of_a_killed_run_is_kept_for_a_while_and_the_error_says_what_to_do(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake.open("s3://bucket/locked", create=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, lake.uri],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[1])},
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    said = (
        rf"in use by 'the first run', process {holder.pid} on {socket.gethostname()}, since .*"
        r"If it was killed.* free 600 s after it was last renewed, in \d+ s,"
        r".*Or remove s3://bucket/locked/lake\.lock, if you are sure"
    )
    with pytest.raises(LakeBusy, match=said), lake.lock("the second"):
        pytest.fail("the lock of a run that may live was taken")
    assert lake.root.list("") == ["lake.json", "lake.lock"]
    monkeypatch.setattr(lock, "STALE_AFTER_S", 0.0)
    with lake.lock("the second"):
        assert json.loads(lake.root.read_bytes(layout.LOCK))["purpose"] == "the second"
    assert lake.root.list("") == ["lake.json"]


def test_a_holder_that_stood_still_does_not_take_its_lock_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    lake = Lake.open("s3://bucket/still", create=True)
    with lake.lock("stands still"):
        renewed = lake.root.modified(layout.LOCK)
        while lake.root.modified(layout.LOCK) == renewed:
            assert b"stands still" in lake.root.read_bytes(layout.LOCK)
        lake.root.write_bytes(layout.LOCK, b'{"token": "of another", "purpose": "goes on"}')
        beats = [t for t in lock.threading.enumerate() if t.name == "lock"]
        for beat in beats:
            beat.join(10)
        assert [t for t in beats if t.is_alive()] == []
    assert b"goes on" in lake.root.read_bytes(layout.LOCK)


def _refused(kind: type[StorageError], *words: str) -> None:
    """Opening, and making, a lake gives an error of a kind that names the lake and the remedy."""
    for create in (False, True):
        with pytest.raises(kind) as raised:
            Lake.open("s3://bucket/none", create=create)
        for word in ("s3://bucket/none", *words):
            assert word in str(raised.value)


def test_absent_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    _refused(NoAccess, "no credentials", "AWS_ACCESS_KEY_ID")
    with pytest.raises(NoAccess, match=r"s3://bucket/urls\.csv: no credentials"):
        list(open_table("s3://bucket/urls.csv", {"url": "url"}))


def test_endpoint_that_nobody_serves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        _refused(TransientError, address, "AWS_ENDPOINT_URL", "try again")


def test_bucket_that_does_not_exist_is_named() -> None:
    with pytest.raises(LakeNotFound, match=r"no lake at s3://nobody/lake.*check the address"):
        Lake.open("s3://nobody/lake")
    with pytest.raises(LakeNotFound, match=r"s3://nobody/lake/lake\.json: .* no such bucket; make"):
        Lake.open("s3://nobody/lake", create=True)
    with pytest.raises(StorageError, match=r"s3://Not_A_Bucket!/lake.*the bucket's name"):
        Lake.open("s3://Not_A_Bucket!/lake", create=True)


def test_credentials_that_the_store_refuses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(checks=True) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.endpoint)
        _refused(NoAccess, "refuses this user", "AWS_ACCESS_KEY_ID")


def test_store_that_goes_away_is_named_wherever_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with object_store("bucket") as short_lived:
        monkeypatch.setenv("AWS_ENDPOINT_URL", short_lived.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        lake = Lake.open("s3://bucket/lake", create=True)
        write_shard(lake, "a", [Sample(key="k", image=b"image", ext="jpg", meta={})])
        rows = rows_table("pairs", [])
        ref = commit_part(lake, "pairs", "a", rows, basis=basis_of("x", 1, {}, []))
        opened = lake.root.open(ref.path)
    for ask in (
        opened.read,
        lambda: read_part(lake, ref),
        lambda: query(lake, "FROM pairs"),
        lambda: list(iter_shard(lake, "a")),
        lambda: lake.root.write_bytes("x", b"x"),
        lambda: lake.root.put_file(tmp_path / "file", "x"),
    ):
        with pytest.raises(TransientError, match=r"s3://bucket/lake.*does not answer.*try again"):
            ask()
