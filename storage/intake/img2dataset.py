"""img2dataset under supervision: a list of URLs goes in, finished shards come out, or an error.

img2dataset cannot be left alone: it ends with status 0 whatever happened, waits for ever for a
worker that was killed, and leaves torn files behind. So nothing it says is believed. A shard
counts when its statistics, its Parquet file and its tar are whole; a run that ends early, or stops
moving, is ended and begun again on what is missing.
"""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import IntakeError, StorageFull
from storage.intake import launch_img2dataset as launcher
from storage.intake.download_config import DownloadConfig
from storage.intake.leftovers import OWNER, end_leftovers
from storage.intake.own_ray import guarded_environment
from storage.worker_process import environment

logger = logging.getLogger(__name__)

POLL_S = 0.2

START_UP_S = 120.0
"""A run may take so long to answer its first request: it is slow to start on a busy machine."""

MIN_FREE_BYTES = 1 << 18
"""With less than this free, a disk is full."""

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


def download(
    slice_parquet: Path,
    folder: Path,
    config: DownloadConfig,
    hosts: str | None = None,
    on_progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch every row (columns row, url) of a Parquet file into img2dataset shards in `folder`.

    `hosts` is the address of a HostServer that gives turns; without one nobody is asked, robots.txt included.
    What is finished there is not fetched again. Returns when all shards are whole. Raises
    IntakeError when restarts bring nothing more or when `stop` is set, StorageFull when the disk is full.
    """
    num_rows = pq.read_metadata(slice_parquet).num_rows
    num_shards = math.ceil(num_rows / config.shard_rows)
    folder.mkdir(parents=True, exist_ok=True)
    end_leftovers(folder)
    done = sweep_unfinished(folder, num_shards)
    restarts_left = config.max_restarts
    while done < num_shards:
        watched = _Watched(num_rows, num_shards, on_progress, stop or threading.Event())
        why = _run(slice_parquet, folder, config, hosts, watched)
        if watched.stop.is_set():
            raise IntakeError(f"img2dataset {why} in {folder}; the same command goes on with it")
        end_leftovers(folder)
        full = _disk_full(folder)
        if full:
            _drop_lossy(folder, num_shards)
        before, done = done, sweep_unfinished(folder, num_shards)
        if done == num_shards:
            break
        if full:
            raise StorageFull(
                f"{folder}: no space left; free some space and run the same command again: what "
                "is finished stays"
            )
        restarts_left = config.max_restarts if done > before else restarts_left - 1
        if restarts_left < 0:
            raise IntakeError(
                f"img2dataset {why}; {done} of {num_shards} shards are whole and "
                f"{config.max_restarts} restarts brought no more. Its last words, from "
                f"{folder / launcher.LOG}: {_last_words(folder)}; mend that and run the same "
                "command again: it goes on with the missing shards"
            )
        logger.warning("img2dataset %s; restarting, %d of %d shards", why, done, num_shards)
    if on_progress is not None:
        on_progress(num_rows, num_rows)


def shard_paths(folder: Path, shard: int) -> tuple[Path, Path, Path]:
    """Tar, Parquet and statistics of one of img2dataset's shards."""
    return (
        folder / f"{shard:05d}.tar",
        folder / f"{shard:05d}.parquet",
        folder / f"{shard:05d}_stats.json",
    )


def sweep_unfinished(folder: Path, num_shards: int) -> int:
    """Remove what is left of shards that are not whole; how many are whole."""
    whole = 0
    for shard in range(num_shards):
        if is_whole(folder, shard):
            whole += 1
            continue
        for path in shard_paths(folder, shard):
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / "_tmp", ignore_errors=True)
    return whole


def is_whole(folder: Path, shard: int) -> bool:
    """Statistics, Parquet file and tar are all there and readable to their ends."""
    tar, parquet, stats = shard_paths(folder, shard)
    if not (tar.exists() and parquet.exists() and stats.exists()):
        return False
    try:
        json.loads(stats.read_bytes())
        rows = pq.read_table(parquet, columns=["key", "status"])
        stored = tar_index(tar)
    except (ValueError, OSError, pa.ArrowException, tarfile.TarError) as err:
        logger.warning("shard %05d in %s is torn (%s): fetching it again", shard, folder, err)
        return False
    fetched = (k for k, s in zip(*rows.to_pydict().values(), strict=True) if s == "success")
    return all(key in stored for key in fetched)


def tar_index(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each image by its key; tarfile.TarError when the tar breaks off."""
    found: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} breaks off")
            key, _, ext = member.name.partition(".")
            if ext not in ("json", "txt"):
                found[key] = (member.offset_data, member.size)
    return found


@dataclass(frozen=True, slots=True)
class _Watched:
    """What a run is to bring, who is told of it, and whether it is still wanted."""

    num_rows: int
    num_shards: int
    on_progress: Progress | None
    stop: threading.Event


def _run(
    slice_parquet: Path,
    folder: Path,
    config: DownloadConfig,
    hosts: str | None,
    watched: _Watched,
) -> str:
    """One run of img2dataset, until all shards have statistics or it fails; what happened."""
    answered = folder / "requests"
    answered.write_bytes(b"")
    moved_at, last = time.monotonic(), (-1, -1, -1)
    with _started(slice_parquet, folder, config, hosts, answered) as process:
        while True:
            stats, tar_bytes = _finished(folder)
            seen = (answered.stat().st_size, stats, tar_bytes)
            if stats >= watched.num_shards:
                return "is done"
            if watched.stop.is_set():
                return "was stopped"
            if process.poll() is not None:
                died = process.returncode == launcher.WORKER_DIED
                return "lost a worker" if died else f"ended early (status {process.returncode})"
            if _nearly_full(folder):
                return "filled the disk"
            if seen != last:
                moved_at, last = time.monotonic(), seen
                if watched.on_progress is not None:
                    watched.on_progress(min(seen[0], watched.num_rows), watched.num_rows)
            patience = config.stall_timeout_s
            if seen[0] == 0:
                patience = max(patience, START_UP_S)
            if time.monotonic() - moved_at > patience:
                return f"made no progress for {patience:g} s"
            time.sleep(POLL_S)


@contextmanager
def _started(
    slice_parquet: Path, folder: Path, config: DownloadConfig, hosts: str | None, answered: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A running img2dataset in a process group of its own; the group is gone afterwards."""
    log: BinaryIO
    (folder / launcher.LOG).write_bytes(b"")
    with ExitStack() as stack:
        env = _environment(folder, config, hosts, answered)
        if config.distributor == "ray":
            env |= stack.enter_context(guarded_environment(folder))
        log = stack.enter_context((folder / launcher.LOG).open("ab"))
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from {launcher.__name__} import main; main()",
                json.dumps(_arguments(slice_parquet, folder, config)),
            ],
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                logger.debug("img2dataset %d had ended", process.pid)
            process.wait()


def _arguments(slice_parquet: Path, folder: Path, config: DownloadConfig) -> dict[str, Any]:
    """Arguments of img2dataset.download."""
    arguments: dict[str, Any] = {
        "url_list": str(slice_parquet),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["row"],
        "output_folder": str(folder),
        "output_format": "webdataset",
        "number_sample_per_shard": config.shard_rows,
        "distributor": config.distributor,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout_s,
        "retries": 0,
        "compute_hash": "sha256",
        "extract_exif": False,
        "enable_wandb": False,
        "incremental_mode": "incremental",
        "max_shard_retry": 0,
        "user_agent_token": config.user_agent_token,
        # Judged in the opener, with the header as evidence.
        "disallowed_header_directives": [],
    }
    if config.image_size_px is None:
        return arguments | {"disable_all_reencoding": True}
    return arguments | {
        "image_size": config.image_size_px,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "min_image_size": config.min_image_side_px,
        "max_image_area": config.max_image_pixels,
    }


def _environment(
    folder: Path, config: DownloadConfig, hosts: str | None, answered: Path
) -> dict[str, str]:
    env = environment() | {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        OWNER: str(folder.resolve()),
        launcher.PROGRESS_FILE: str(answered),
        launcher.FETCHING: json.dumps(asdict(config.opener) | {"hosts": hosts}),
    }
    if config.http_proxy is not None:
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")
        env |= dict.fromkeys(names, config.http_proxy) | {"no_proxy": ""}
    return env


def _finished(folder: Path) -> tuple[int, int]:
    """How many shards have statistics, and the bytes of all tars."""
    stats = tar_bytes = 0
    for entry in os.scandir(folder):
        stats += entry.name.endswith("_stats.json")
        if entry.name.endswith(".tar"):
            tar_bytes += entry.stat().st_size
    return stats, tar_bytes


def _disk_full(folder: Path) -> bool:
    """Whether that is why img2dataset failed: it only prints it, if it still can, and hangs."""
    return _nearly_full(folder) or "No space left on device" in _last_words(folder, 20_000)


def _nearly_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < MIN_FREE_BYTES


def _drop_lossy(folder: Path, num_shards: int) -> None:
    """Remove finished shards that lack rows: on a full disk img2dataset drops what fails."""
    for shard in range(num_shards):
        if not is_whole(folder, shard):
            continue
        _, parquet, stats = shard_paths(folder, shard)
        if pq.read_metadata(parquet).num_rows < json.loads(stats.read_bytes())["count"]:
            stats.unlink()


def _last_words(folder: Path, num_bytes: int = 600) -> str:
    log = folder / launcher.LOG
    if not log.exists():
        return "none"
    with log.open("rb") as f:
        f.seek(max(log.stat().st_size - num_bytes, 0))
        return " ".join(f.read().decode("utf-8", "replace").split())
