"""The process in which img2dataset runs: `main` with JSON arguments.

It calls img2dataset's own `download` with them. Around it stand four things
that img2dataset lacks, none of which changes what it does with an image:

- every process of it dies with the one that started it, so nothing goes on writing unseen;
- a worker that dies ends the run at once; left alone, it would wait for that worker for ever;
- a response is bounded in bytes and in seconds, and only http and https addresses are opened;
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
import time
import traceback
import types
import urllib.request
from typing import Any

WORKER_DIED = 70
"""Exit status when a worker process ended on its own."""

PROGRESS_FILE = "BOOTSTRAP_PROGRESS_FILE"
MAX_BYTES = "BOOTSTRAP_MAX_IMAGE_BYTES"
DEADLINE_S = "BOOTSTRAP_REQUEST_DEADLINE_S"
OWNER = "BOOTSTRAP_DOWNLOAD_FOLDER"
"""Environment variables; the last one marks every process of a download with its folder."""

_BLOCK = 1 << 16


class _Worker(multiprocessing.context.ForkServerProcess):
    """A pool worker whose unnatural end is the end of the run."""

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        # A pool ends its own workers with SIGTERM.
        if self.exitcode not in (None, 0, -signal.SIGTERM):
            os._exit(WORKER_DIED)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Worker


class _Opener(urllib.request.OpenerDirector):
    """urllib's opener for http and https alone, with bounded responses and a count of requests."""

    def __init__(self) -> None:
        super().__init__()
        for handler in (
            urllib.request.ProxyHandler,
            urllib.request.UnknownHandler,
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPErrorProcessor,
        ):
            self.add_handler(handler())
        self._max_bytes = int(os.environ[MAX_BYTES])
        self._seconds = float(os.environ[DEADLINE_S])
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._progress = os.open(os.environ[PROGRESS_FILE], flags, 0o644)

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        ends_at = time.monotonic() + self._seconds
        try:
            response: Any = super().open(fullurl, data, timeout)
        finally:
            # One byte for each answered request: the supervisor watches the file grow.
            os.write(self._progress, b".")
        read_some = response.read1

        def read() -> bytes:
            blocks, held = [], 0
            while block := read_some(_BLOCK):
                blocks.append(block)
                held += len(block)
                if held > self._max_bytes:
                    raise OSError(f"response exceeds {self._max_bytes} bytes")
                if time.monotonic() > ends_at:
                    raise TimeoutError(f"timed out: not whole after {self._seconds:g} s")
            return b"".join(blocks)

        response.read = read
        return response


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
    urllib.request.install_opener(_Opener())


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
