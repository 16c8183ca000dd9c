"""Faults of the machine in the middle of an intake: no room, no right to write, and clocks that jump by days."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hostile_web import HostileWeb, serve
from intake_runs import processes_of, start
from small_disks import grow, immutable, read_only, small_disk
from test_faults import assert_same
from web_world import write_list

from storage import layout
from storage.catalog import query
from storage.errors import NotWritable, StorageFull
from storage.fingerprint import basis_of
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake
from storage.tables import Clock, commit_part, list_parts, part_manifest, rows_table

SETTINGS = {
    "allow_addresses": ["127.0.0.1/32"],
    "shard_rows": 20,
    "threads": 8,
    "retry_passes": 0,
}
CONFIG = DownloadConfig(**SETTINGS | {"allow_addresses": ("127.0.0.1/32",)})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def web() -> Iterator[HostileWeb]:
    with serve() as served:
        yield served


@pytest.fixture(scope="module")
def url_list(web: HostileWeb, tmp_path_factory: pytest.TempPathFactory) -> UrlListConfig:
    """Eighty rows; of each ten, seven are pictures of their own."""
    pages = ("ok.jpg?n={0}",) * 7 + ("ok.jpg?n=1&row={0}", "none.jpg?n={0}", "html.jpg?n={0}")
    rows = [(web.url(pages[n % 10].format(n)), f"text {n}") for n in range(80)]
    path = write_list(tmp_path_factory.mktemp("list") / "urls.parquet", rows)
    return UrlListConfig(path=str(path))


@pytest.fixture(scope="module")
def undisturbed(url_list: UrlListConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake.open(str(tmp_path_factory.mktemp("undisturbed") / "lake"), create=True)
    ingest_urls(lake, url_list, CONFIG, round=1)
    assert query(lake, "FROM pairs WHERE status = 'ok'").num_rows == 56
    return lake


def test_disk_that_fills_up_again_and_again_ends_with_the_lake_of_an_undisturbed_run(
    undisturbed: Lake, url_list: UrlListConfig, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        lake = Lake.open(str(disk / "lake"), create=True)
        finished = []
        small_slices = replace(CONFIG, slice_rows=20)
        for size in ("16k", "370k"):
            grow(disk, size)
            with pytest.raises(StorageFull, match=rf"{disk}.*free some space"):
                ingest_urls(lake, url_list, small_slices, round=1)
            assert processes_of(lake.uri) == []
            finished.append(len(list_parts(lake, "pairs")))
        assert finished[0] == 0
        assert 0 < finished[-1] < 4, "the disk was to be full in the middle"
        grow(disk, "64m")
        ingest_urls(lake, url_list, CONFIG, round=1)
        assert_same(lake, undisturbed)
        assert lake.root.sweep("") == 0


def test_folder_that_nobody_may_write_to_is_named_and_the_intake_goes_on_when_it_may(
    undisturbed: Lake, url_list: UrlListConfig, tmp_path: Path
) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    with lake.lock("make the folders"):
        folders = [tmp_path / "lake" / name for name in (".", "work", "shards", "tables")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        with (
            read_only(folder),
            pytest.raises(NotWritable, match=rf"{folder}.*give this user the right"),
        ):
            ingest_urls(lake, url_list, CONFIG, round=1)
        assert list_parts(lake, "pairs") == []
    ingest_urls(lake, url_list, CONFIG, round=1)
    assert_same(lake, undisturbed)


def test_shard_that_nobody_may_change_is_named_when_it_has_to_be_replaced(
    web: HostileWeb, tmp_path: Path
) -> None:
    rows = [(web.url(f"ok.jpg?n={n}"), f"text {n}") for n in range(5)]
    url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows)))
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    ingest_urls(lake, url_list, CONFIG, round=1)
    larger = replace(CONFIG, min_image_side_px=2)
    shard = lake.root.local_path(layout.shard("web-0001-00-00000"))
    assert shard is not None
    held = shard.read_bytes()
    with immutable(shard), pytest.raises(NotWritable, match=rf"{shard.name}.*the right to write"):
        ingest_urls(lake, url_list, larger, round=1, on_stale="rebuild")
    assert shard.read_bytes() == held
    ingest_urls(lake, url_list, larger, round=1, on_stale="rebuild")
    assert query(lake, "FROM pairs WHERE status = 'ok'").num_rows == 5


JUMPING = """
import itertools, time

_time, _days = time.time, itertools.cycle((5, -9, 2, 30, -400))


def _jumping():
    return _time() + 86_400 * next(_days)


time.time, time.time_ns = _jumping, lambda: int(_jumping() * 1e9)
"""
"""For every process of an intake: a time of day that is some days off, others at each look."""


def test_clock_that_jumps_by_days_changes_nothing_but_the_times(
    undisturbed: Lake, url_list: UrlListConfig, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    assert start(lake, Path(url_list.path), SETTINGS, PYTHONPATH=str(tmp_path)).wait() == 0
    assert_same(lake, undisturbed)
    fetched = (
        "SELECT abs(date_diff('day', fetched_at, now())) AS days FROM pairs WHERE attempts > 0"
    )
    days = [row["days"] for row in query(lake, fetched).to_pylist()]
    assert len(days) == 80
    assert min(days) > 0, "the clock was right"


def test_seconds_of_a_part_do_not_depend_on_the_time_of_day(local_lake: Lake) -> None:
    for days in (-3, 3):
        clock = Clock(started_at=datetime.now(UTC) + timedelta(days=days))
        basis = basis_of("x", 1, {}, [])
        ref = commit_part(
            local_lake, "metrics", "x", rows_table("metrics", []), round=1, basis=basis, clock=clock
        )
        assert 0 <= part_manifest(local_lake, ref).seconds < 86_400
