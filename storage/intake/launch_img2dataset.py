"""The process in which img2dataset runs: `main` with JSON arguments.

It calls img2dataset's own `download` with them. Around it stand five things
that img2dataset lacks, none of which changes what it does with an image:

- every process of it dies with the one that started it, so nothing goes on writing unseen;
- a worker that dies ends the run at once; left alone, it would wait for that worker for ever;
- requests go through an opener of ours (`fetching.opener`): checked addresses, bounded answers, turns at hosts;
  a process without it downloads nothing;
- its workers may be those of a Ray that is started for the run (`own_ray`);
- the modules are loaded once, in a fork server, instead of once in each process, and without
  torch and wandb, which nothing here uses: 4 seconds to start rather than 17.

Only `storage.intake.img2dataset` starts this; the module is imported in its workers too.
"""

import ctypes
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import traceback
import types
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any

from storage.intake import own_ray
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.opener import Opener, OpenerConfig
from storage.intake.leftovers import OWNER

WORKER_DIED = 70
"""Exit status when a worker process ended on its own."""

PROGRESS_FILE = "BOOTSTRAP_PROGRESS_FILE"
FETCHING = "BOOTSTRAP_FETCHING"
"""Environment variables of a download's processes, beside OWNER, its folder."""

LOG = "img2dataset.log"
"""In the folder of a download: what its processes say."""


class _Worker(multiprocessing.context.ForkServerProcess):
    """A pool worker whose unnatural end is the end of the run."""

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        # A pool ends its own workers with SIGTERM.
        if self.exitcode not in (None, 0, -signal.SIGTERM):
            os._exit(WORKER_DIED)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Worker


class GuardedDownloader:
    """img2dataset's downloader of shards, which refuses to work where no opener of ours is installed."""

    def __init__(self, **settings: Any) -> None:
        """Take what img2dataset's own takes."""
        self._downloader = Downloader(**settings)

    def __call__(self, shard: own_ray.Shard) -> tuple[bool, own_ray.Shard]:
        """Download a shard. Raises RuntimeError before any request when requests would go unchecked."""
        if not isinstance(getattr(urllib.request, "_opener", None), Opener):
            raise RuntimeError(
                f"process {os.getpid()} downloads nothing: no opener that checks addresses and asks hosts is "
                f"installed in it, for {OWNER} is not in its environment; start img2dataset through "
                "storage.intake.img2dataset"
            )
        found: tuple[bool, own_ray.Shard] = self._downloader(shard)
        return found


def _install_opener() -> None:
    """Let urllib, which img2dataset fetches with, go by what the supervisor has put into the environment."""
    given = json.loads(os.environ[FETCHING])
    hosts = given.pop("hosts")
    config = OpenerConfig(**given)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    progress = os.open(os.environ[PROGRESS_FILE], flags, 0o644)
    # Who kept the book is who started this download, and is dead: no outcome of now is to be written.
    client = HostClient(hosts, on_gone=lambda: os._exit(WORKER_DIED)) if hosts is not None else None
    urllib.request.install_opener(Opener(config, client, progress))


def _die_with_parent() -> None:
    """Linux: SIGKILL as soon as the parent is gone (PR_SET_PDEATHSIG is 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _get_context(method: str | None = None) -> Any:
    if method == "spawn":
        return _real_get_context("fork") if own_ray.FOLDER in os.environ else _Context()
    return _real_get_context(method)


def _prepare() -> None:
    """Done in the main process, in the fork server, whose forks are the workers, and in workers of Ray's."""
    _die_with_parent()
    # A fork does not inherit the wish.
    os.register_at_fork(after_in_child=_die_with_parent)
    # webdataset and albumentations take torch where it can be had, and then use none of it here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    # img2dataset asks for "spawn" by name, for its pool and for its logger.
    multiprocessing.get_context = _get_context
    if own_ray.FOLDER in os.environ:
        _say_into(Path(os.environ[OWNER]) / LOG)
        # The logger alone: no fork server is worth its while, and no thread is there yet when it is forked.
        multiprocessing.context.SpawnProcess = multiprocessing.context.ForkProcess  # type: ignore[misc, assignment]
    else:
        multiprocessing.context.SpawnProcess = _Worker  # type: ignore[misc, assignment]
        # img2dataset imports it where it can be had.
        sys.modules.setdefault("ray", None)  # type: ignore[arg-type]
    _install_opener()


def _say_into(log: Path) -> None:
    """Let output go into a file; a worker of Ray's has one of its own, which nobody reads."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


OURS: dict[str, Any] = {
    "Downloader": GuardedDownloader,
    "ray_distributor": own_ray.distribute,
}
"""What img2dataset uses in the place of its own; a release that has none of that name does not run."""

_real_get_context = multiprocessing.get_context
if OWNER in os.environ:
    # Importing does nothing elsewhere; with the marker set, this is a process of a download.
    _prepare()
    from img2dataset.downloader import Downloader


def main() -> None:
    """Run img2dataset with the arguments given as JSON."""
    multiprocessing.set_forkserver_preload([__name__])
    try:
        # The package has a function of that name.
        theirs: Any = import_module("img2dataset.main")
        for name, ours in OURS.items():
            getattr(theirs, name)
            setattr(theirs, name, ours)
        theirs.download(**json.loads(sys.argv[1]))
    except own_ray.WorkerDied:
        os._exit(WORKER_DIED)
    except Exception:  # noqa: BLE001 - whatever it is, it goes into the log
        # The logger process would never be told to end, and an ordinary exit waits for it.
        traceback.print_exc()
        os._exit(1)
