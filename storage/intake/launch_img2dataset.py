"""The process in which img2dataset runs: `main` with JSON arguments.

It calls img2dataset's own `download` with them. Around it stand four things
that img2dataset lacks, none of which changes what it does with an image:

- every process of it dies with the one that started it, so nothing goes on writing unseen;
- a worker that dies ends the run at once; left alone, it would wait for that worker for ever;
- requests go through an opener of ours (`fetching.opener`): checked addresses, bounded answers, turns at hosts;
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
from typing import Any

from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.opener import Opener, OpenerConfig

WORKER_DIED = 70
"""Exit status when a worker process ended on its own."""

PROGRESS_FILE = "BOOTSTRAP_PROGRESS_FILE"
FETCHING = "BOOTSTRAP_FETCHING"
OWNER = "BOOTSTRAP_DOWNLOAD_FOLDER"
"""Environment variables; the last one marks every process of a download with its folder."""


class _Worker(multiprocessing.context.ForkServerProcess):
    """A pool worker whose unnatural end is the end of the run."""

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        # A pool ends its own workers with SIGTERM.
        if self.exitcode not in (None, 0, -signal.SIGTERM):
            os._exit(WORKER_DIED)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Worker


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
    return _Context() if method == "spawn" else _real_get_context(method)


def _prepare() -> None:
    """Done in the main process and in the fork server, whose forks are the workers."""
    _die_with_parent()
    # A fork does not inherit the wish.
    os.register_at_fork(after_in_child=_die_with_parent)
    # webdataset and albumentations take torch where it can be had, and then use none of it here.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    # img2dataset asks for "spawn" by name, for its pool and for its logger.
    multiprocessing.get_context = _get_context
    multiprocessing.context.SpawnProcess = _Worker  # type: ignore[misc, assignment]
    _install_opener()


_real_get_context = multiprocessing.get_context
if OWNER in os.environ:
    # Importing does nothing elsewhere; with the marker set, this is a process of a download.
    _prepare()
    from img2dataset.main import download


def main() -> None:
    """Run img2dataset with the arguments given as JSON."""
    multiprocessing.set_forkserver_preload([__name__])
    try:
        download(**json.loads(sys.argv[1]))
    except Exception:  # noqa: BLE001 - whatever it is, it goes into the log
        # The logger process would never be told to end, and an ordinary exit waits for it.
        traceback.print_exc()
        os._exit(1)
