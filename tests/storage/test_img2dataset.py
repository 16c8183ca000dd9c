"""img2dataset misbehaves in these tests for real: its processes are killed and stopped."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_world import PictureServer, download_config

from storage.errors import ConfigError, IntakeError, StorageFull
from storage.intake import leftovers
from storage.intake.download_config import DownloadConfig
from storage.intake.img2dataset import download, is_whole, sweep_unfinished


def fetch_list(path: Path, num_rows: int, host: str) -> Path:
    urls = [f"http://{host}/ok{i}.jpg" for i in range(num_rows)]
    pq.write_table(pa.table({"row": list(range(num_rows)), "url": urls}), path)
    return path


def worker_of(folder: Path) -> int | None:
    """The downloading process: the youngest child of the fork server."""
    mark = f"{leftovers.OWNER}={folder}".encode()
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                parents[int(entry.name)] = int((entry / "stat").read_text().split()[3])
        except OSError:
            continue
    grandchildren = [pid for pid, parent in parents.items() if parents.get(parent) in parents]
    return max(grandchildren, default=None)


def signal_worker_once(
    folder: Path, pictures: PictureServer, after: int, signum: int, hit: list[int]
) -> None:
    """Send a signal to the worker when so many requests have been answered."""
    while pictures.num_requests < after:
        time.sleep(0.01)
    worker = worker_of(folder)
    if worker is not None:
        os.kill(worker, signum)
        hit.append(worker)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_download_goes_on_when_its_worker_is(
    tmp_path: Path, pictures: PictureServer, signum: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = download_config(pictures, threads=2, stall_timeout_s=4.0)
    source = fetch_list(tmp_path / "list.parquet", 60, f"{signum.name.lower()}.test")  # type: ignore[attr-defined]
    folder = tmp_path / "out"
    hit: list[int] = []
    after = pictures.num_requests + 25
    thread = threading.Thread(
        target=signal_worker_once, args=(folder, pictures, after, signum, hit)
    )
    pictures.delay_s = 0.05
    thread.start()
    try:
        download(source, folder, config)
    finally:
        pictures.delay_s = 0.0
        thread.join()
    assert hit, "there was no worker to hit"
    assert "restarting" in caplog.text
    expected = "lost a worker" if signum == signal.SIGKILL else "made no progress for 4 s"
    assert expected in caplog.text
    assert all(is_whole(folder, shard) for shard in range(6))
    rows = [
        row
        for shard in range(6)
        for row in pq.read_table(folder / f"{shard:05d}.parquet").column("row").to_pylist()
    ]
    assert sorted(rows) == list(range(60))
    assert worker_of(folder) is None
    # Whole shards are not fetched again; a torn one is, and it alone.
    torn = folder / "00003.tar"
    torn.write_bytes(torn.read_bytes()[:700])
    (folder / "00004.parquet").write_bytes(b"")
    assert sweep_unfinished(folder, 6) == 4
    assert not torn.exists()
    assert not (folder / "00004_stats.json").exists()


def test_download_says_storage_full_and_goes_on_when_there_is_space(
    tmp_path: Path, pictures: PictureServer
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    source = fetch_list(tmp_path / "list.parquet", 400, "full.test")
    config = download_config(pictures, shard_rows=100)
    try:
        with pytest.raises(StorageFull, match=r"small/out: no space left; free some space"):
            download(source, folder / "out", config)
        before = pictures.num_requests
        subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
        download(source, folder / "out", config)
        assert pictures.num_requests - before <= 300, "what was finished was fetched again"
        counts = [pq.read_metadata(folder / f"out/{i:05d}.parquet").num_rows for i in range(4)]
        assert counts == [100] * 4
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_download_gives_up_with_the_last_words_when_nothing_helps(
    tmp_path: Path, pictures: PictureServer
) -> None:
    pq.write_table(
        pa.table({"row": [0], "adress": ["http://x.test/ok1.jpg"]}), tmp_path / "l.parquet"
    )
    config = download_config(pictures, max_restarts=0)
    with pytest.raises(IntakeError, match=r"ended early.*0 of 1 shards.*img2dataset\.log.*url"):
        download(tmp_path / "l.parquet", tmp_path / "out", config)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard_rows", 0), ("timeout_s", 0.0), ("image_size_px", 0), ("max_restarts", -1)],
)
def test_config_names_the_field_that_is_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be"):
        DownloadConfig(**{field: value})  # type: ignore[arg-type]
