"""One process of a captioning or scoring that several share; `flows.curators` starts it with a socket.

It asks for a shard when it has room for one, tells what it has done, and ends at once when whoever started it has.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from flows.errors import Stopped
from flows.session import Run
from flows.settings import parse_settings
from flows.steps.curate import Curation
from flows.steps.shard_jobs import ShardDone
from flows.stopping import Stop, stopped_by_sigterm
from storage import Lake, PartRef


class Link:
    """The socket to the flow's process: asks it for shards, reports to it, hears when to stop."""

    def __init__(self, connection: Connection, stop: Stop) -> None:
        self._connection, self._stop = connection, stop
        self._lock = threading.Lock()
        self._shards: queue.SimpleQueue[PartRef | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="link").start()

    def claims(self) -> Iterator[PartRef]:
        """Shards that are ours, one for each time that we ask."""
        while not self._stop.is_asked:
            self.tell("next")
            pairs = self._shards.get()
            if pairs is None:
                return
            yield pairs

    def images(self, pairs: PartRef, count: int) -> None:
        """Some images of a shard have been taken."""
        self.tell("images", pairs, count)

    def shard(self, done: ShardDone) -> None:
        """A shard is committed."""
        self.tell("done", done)

    def tell(self, *message: Any) -> None:
        """Send a message, from any thread."""
        with self._lock:
            self._connection.send(message)

    def _listen(self) -> None:
        try:
            while True:
                kind, *what = self._connection.recv()
                if kind == "stop":
                    self._stop.ask()
                else:
                    self._shards.put(what[0])
        except (EOFError, OSError):
            os._exit(1)  # nobody waits for what we do, and somebody else may begin it


def main(socket_fd: int) -> None:
    """Work until there is no more, or until we are stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    connection = Connection(socket_fd)
    job = connection.recv()
    logging.basicConfig(level=job["log_level"], format="%(levelname)s %(name)s: %(message)s")
    settings = parse_settings(job["settings"])
    torch.set_num_threads(settings.machine.num_threads or 1)
    scratch = Path(job["scratch"]) if job["scratch"] else None
    lake = Lake.open(settings.machine.lake, scratch_root=scratch)
    run = Run(lake, settings, job["round"], job["variant"])
    with stopped_by_sigterm() as stop:
        link = Link(connection, stop)
        try:
            captioner, scorer = job["refs"]
            curation = Curation(run, captioner, scorer, link, stop)
            curation.run_shards(link.claims(), expected=job["expected"], plans_ahead=1)
            link.tell("through")
        except Stopped as stopped:
            link.tell("stopped", stopped.what)
        except Exception as err:  # noqa: BLE001 - whatever it is, it is raised where the flow runs
            link.tell("error", _portable(err))


def _portable(err: Exception) -> Exception:
    """The error itself where it can travel, else one that says the same."""
    try:
        copy = pickle.loads(pickle.dumps(err))
    except Exception:  # noqa: BLE001 - an error that cannot be sent must not hide
        copy = None
    return err if type(copy) is type(err) else RuntimeError(f"{type(err).__name__}: {err}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
