"""Captioning and scoring in several processes of this machine: one a device, a shard the unit of work.

The flow's process hands out shards and alone decides who has which; `flows.curator` is what it starts. A process
that dies gives its shards back by dying: it is waited for before anybody else gets them, so that no two ever write
one part. Machines that share a lake would ask the same questions of somebody they can all reach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, Any, Protocol

import torch

from flows.errors import Stopped, WorkerDied
from flows.session import Run
from flows.steps.curate import Report
from flows.steps.shard_jobs import ShardDone
from flows.stopping import Stop
from storage import ModelRef, PartRef

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Processes that may die with no shard finished in between."""
NUM_LAST_LINES = 20
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END = 20.0


class SharedReport(Report, Protocol):
    """Who is told how far all of them are."""

    def give_back(self, pairs: PartRef) -> None:
        """A shard that was under way is begun again: its process died."""


@dataclass(kw_only=True, eq=False)
class _Worker:
    """One process, what it has claimed, and what it said."""

    number: int
    popen: subprocess.Popen[str]
    connection: Connection
    claimed: dict[str, PartRef] = field(default_factory=dict)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_LINES))
    is_through: bool = False
    """Whether it ended because there was no more work."""


class Curators:
    """Several processes at work on shards; `run_shards` once."""

    def __init__(
        self,
        run: Run,
        captioner: ModelRef | None,
        scorer: ModelRef | None,
        tally: SharedReport,
        stop: Stop,
    ) -> None:
        """Nothing is started yet; `tally` is told of all processes' work."""
        self._run, self._refs, self._tally, self._stop = run, (captioner, scorer), tally, stop
        self._processes = run.settings.machine.curate_processes
        self._free: deque[PartRef] = deque()
        self._workers: dict[Connection, _Worker] = {}
        self._deaths = 0
        self._endings: list[str] = []
        self._is_told = False

    def run_shards(self, shards: Sequence[PartRef]) -> None:
        """Work on all shards, in about their order.

        Raises what a process raised; WorkerDied when they keep dying; Stopped when an end was asked for.
        """
        self._free.extend(shards)
        expected = -(-len(shards) // self._processes)
        try:
            for number in range(min(self._processes, len(shards))):
                self._start(number, expected)
            while self._workers:
                for connection in wait(list(self._workers), timeout=SECONDS_BETWEEN_LOOKS):
                    self._listen(self._workers[connection], expected)  # type: ignore[index]
                self._hand_stop_on()
        finally:
            for worker in self._workers.values():
                _end(worker)
        if self._stop.is_asked:
            told = "; ".join(dict.fromkeys(self._endings)) or "no shard was under way"
            raise Stopped(told)

    def _listen(self, worker: _Worker, expected: int) -> None:
        try:
            kind, *what = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker, expected)
            return
        if kind == "next":
            pairs = self._free.popleft() if self._free and not self._stop.is_asked else None
            if pairs is not None:
                worker.claimed[pairs.name] = pairs
            with contextlib.suppress(OSError):  # one that died meanwhile is noticed next
                worker.connection.send(("shard", pairs))
        elif kind == "images":
            self._tally.images(*what)
        elif kind == "done":
            done: ShardDone = what[0]
            del worker.claimed[done.pairs.name]
            self._deaths = 0
            self._tally.shard(done)
        elif kind == "stopped":
            self._endings.append(what[0])
        elif kind == "error":
            raise what[0]
        elif kind == "through":
            worker.is_through = True

    def _bury(self, worker: _Worker, expected: int) -> None:
        """A process has ended: its shards are free again once it is really gone."""
        del self._workers[worker.connection]
        worker.connection.close()
        status = worker.popen.wait()
        lost = list(worker.claimed.values())
        self._free.extendleft(reversed(lost))
        for pairs in lost:
            self._tally.give_back(pairs)
        if self._stop.is_asked or (worker.is_through and not self._free):
            return
        if not worker.is_through:
            self._deaths += 1
            logger.warning(
                "process %d of %d ended with status %s; %d shards that it had are begun again",
                worker.number + 1,
                self._processes,
                status,
                len(lost),
            )
        if self._deaths >= MAX_DEATHS:
            words = "\n".join(worker.last_lines) or "it said nothing"
            raise WorkerDied(
                f"{self._deaths} processes died in a row, the last with status {status}: {words}; what is committed "
                "stays. Out of memory? Lower machine.curate_processes or the batch size, then run the same command"
            )
        if self._free:
            self._start(worker.number, expected)

    def _start(self, number: int, expected: int) -> None:
        ours, theirs = socket.socketpair()
        lock = self._run.lake.lock_fd
        with theirs:
            # Who holds the lock's descriptor holds the lock: no other run begins before the last of us is gone.
            popen = subprocess.Popen(
                [sys.executable, "-m", "flows.curator", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(theirs.fileno(), *([] if lock is None else [lock])),
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            )
        worker = _Worker(number=number, popen=popen, connection=Connection(ours.detach()))
        assert popen.stderr is not None
        reader = threading.Thread(
            target=_keep_last, args=(popen.stderr, worker.last_lines), daemon=True
        )
        reader.start()
        self._workers[worker.connection] = worker
        with contextlib.suppress(OSError):
            worker.connection.send(self._job(number, expected))

    @property
    def _threads(self) -> int:
        """Threads of each process: an even share."""
        every = self._run.settings.machine.num_threads or os.cpu_count() or 1
        return max(1, every // self._processes)

    def _job(self, number: int, expected: int) -> dict[str, Any]:
        machine = self._run.settings.machine
        device = str(self._run.device)
        if self._run.device.type == "cuda" and self._run.device.index is None:
            device = f"cuda:{number % torch.cuda.device_count()}"
        share = {
            "device": device,
            "num_threads": self._threads,
            "decode_workers": max(1, machine.decode_workers // self._processes),
        }
        settings = self._run.settings.with_changes({"machine": share})
        return {
            "settings": settings.model_dump(mode="json"),
            "round": self._run.round,
            "variant": self._run.variant,
            "scratch": str(self._run.lake.scratch_root) if self._run.lake.scratch_root else None,
            "refs": self._refs,
            "expected": expected,
            "log_level": logging.getLogger("flows").getEffectiveLevel(),
        }

    def _hand_stop_on(self) -> None:
        if self._stop.is_asked and not self._is_told:
            self._is_told = True
            for connection in self._workers:
                with contextlib.suppress(OSError):
                    connection.send(("stop",))


def _keep_last(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip())
        logger.info("%s", line.rstrip())


def _end(worker: _Worker) -> None:
    """End a process that is still there, and wait until it is gone."""
    with contextlib.suppress(OSError):
        worker.connection.close()  # it ends when it notices
    try:
        worker.popen.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        worker.popen.kill()
        worker.popen.wait()
