"""A Ray that one run of img2dataset has to itself, on this machine: started for it, and gone with it.

The supervisor uses `guarded_environment`, the process in which img2dataset runs `distribute`. Nothing here imports Ray but the
latter: it is an extra, and slow to import.
"""

import os
import secrets
import site
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.intake import leftovers

FOLDER = "BOOTSTRAP_RAY_FOLDER"
"""Environment variable: where the Ray of a run keeps sockets and logs; set in its processes alone."""

OBJECT_STORE_BYTES = 80 << 20
"""Ray takes no less than 75 MiB, and what goes through it here are names of files."""

MOST_PARENT_CHARS = 22
"""Ray puts some 80 characters behind it, and a socket's path may have 103."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A token of this run's own, below, rather than one in the home folder.
    "RAY_AUTH_MODE": "token",
    # Ports on the loopback address alone, as Ray has it on macOS; elsewhere it listens on all of the machine's.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A process's title would be written over its environment, by which it is found.
    "SPT_NOENV": "1",
    # It would kill a downloading worker because something else fills the memory.
    "RAY_memory_monitor_refresh_ms": "0",
}

Shard = tuple[int, str]
"""Number, and file with its part of the list."""


class WorkerDied(Exception):
    """A worker of Ray's ended before its shard did."""


def require_ray() -> None:
    """Raise ConfigError when there is no Ray to be started, or when another one is meant."""
    if find_spec("ray") is None:
        raise ConfigError(
            "ingest.distributor: ray needs the package ray, which is not installed: "
            "`pip install 'blip-bootstrap[ray]'`, or set it to multiprocessing"
        )
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "local"):
        raise ConfigError(
            f"ingest.distributor: ray starts a Ray of its own on this machine, and cannot join the one at "
            f"RAY_ADDRESS={address} yet: turns at hosts are given and shards are written on one machine; "
            "unset RAY_ADDRESS for this command, or set ingest.distributor to multiprocessing"
        )


@contextmanager
def guarded_environment(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a run that starts a Ray for a download into `folder`; its guard is there as long.

    The guard ends what this process leaves when it is killed: some helpers of Ray's outlive their parents by more than ten seconds.
    """
    system = tempfile.gettempdir()
    parent = system if len(system) <= MOST_PARENT_CHARS else "/tmp"
    with tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True) as own:
        (Path(own) / "ray_bootstrap_config.yaml").write_text("{}\n")
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", leftovers.__file__, str(os.getpid()), str(folder), own],
            # With the mark: a later download into the folder ends this guard before it begins.
            env=os.environ | {leftovers.OWNER: str(folder.resolve())},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield _ENVIRONMENT | {
                FOLDER: own,
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                # Without a file of that name in its home, Ray asks the metadata services of three clouds where it is,
                # usage statistics or not. It has no business in the user's home either.
                "HOME": own,
                "PYTHONUSERBASE": site.getuserbase(),
            }
        finally:
            guard.kill()
            guard.wait()
            leftovers.end_leftovers(folder)


def distribute(
    processes: int,
    downloader: Callable[[Shard], tuple[bool, Shard]],
    shards: Iterable[Shard],
    *_: Any,
) -> None:
    """Start a Ray and let so many of its processes download shards, one each at a time.

    In img2dataset's place, whose own gives a dead worker's shard to another one and tells nobody. Raises WorkerDied,
    and whatever a worker raises.
    """
    ray = import_module("ray")
    ray.init(
        address="local",
        num_cpus=processes,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        # Within it, for Ray lets everybody write into its own.
        _temp_dir=f"{os.environ[FOLDER]}/r",
    )
    task = ray.remote(num_cpus=1, max_retries=0)(_downloaded)
    shared = ray.put(downloader)
    running: list[Any] = []
    try:
        for shard in shards:
            running.append(task.remote(shared, shard))
            if len(running) > 2 * processes:
                done, running = ray.wait(running)
                ray.get(done)
        ray.get(running)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.RaySystemError) as err:
        traceback.print_exc()
        raise WorkerDied from err


def _downloaded(downloader: Callable[[Shard], tuple[bool, Shard]], shard: Shard) -> bool:
    """Whether a shard came to its end; in a worker."""
    return downloader(shard)[0]
