"""Worker processes that are replaced when they die, one for each thread that has something to ask."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from storage.worker_process import WorkerGone, WorkerProcess

logger = logging.getLogger(__name__)

TRIES = 2
"""How often a chunk is given to a process before it is taken apart."""

Worker = TypeVar("Worker", bound=WorkerProcess)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class WorkerPool(Generic[Worker]):
    """Starts a process when a thread first asks; `stop` it, let the threads end, then `join` it."""

    def __init__(self, start: Callable[[], Worker], does: str) -> None:
        """`does` says in the log what the processes are for."""
        self._start_one, self._does = start, does
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[Worker] = []
        self._is_stopped = False

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that are there."""
        with self._lock:
            return [worker.pid for worker in self._all]

    def answers(
        self,
        chunk: list[Item],
        ask: Callable[[Worker, list[Item]], Answer],
        give_up: Callable[[Item], Answer],
    ) -> Iterator[Answer]:
        """What `ask` gives of a chunk, or of the parts of it when it brings its process down, in order.

        An item that takes its process along every time is its own fault and no other item's: `give_up` answers for it.
        Raises RuntimeError once the pool is stopped.
        """
        for _ in range(TRIES):
            worker: Worker | None = getattr(self._own, "worker", None)
            if worker is None:
                worker = self._own.worker = self._start()
            try:
                answer = ask(worker, chunk)
            except WorkerGone as err:
                self._own.worker = None
                self._bury(worker, err)
            else:
                yield answer
                return
        if len(chunk) == 1:
            yield give_up(chunk[0])
            return
        middle = len(chunk) // 2
        yield from self.answers(chunk[:middle], ask, give_up)
        yield from self.answers(chunk[middle:], ask, give_up)

    def stop(self) -> None:
        """Kill all processes, which have nothing to lose; threads that wait for their answers are not answered."""
        with self._lock:
            self._is_stopped = True
            for worker in self._all:
                worker.kill()

    def join(self) -> None:
        """Wait for the processes, once no thread asks any more."""
        for worker in self._all:
            worker.end()
        self._all.clear()

    def _start(self) -> Worker:
        with self._lock:
            self._must_go_on()
            worker = self._start_one()
            self._all.append(worker)
        return worker

    def _bury(self, worker: Worker, why: WorkerGone) -> None:
        with self._lock:
            self._must_go_on()
            self._all.remove(worker)
        status = worker.end()
        logger.warning(
            "process %d, which %s, ended with status %d (%s); what it was at is done again",
            worker.pid,
            self._does,
            status,
            why,
        )

    def _must_go_on(self) -> None:
        if self._is_stopped:
            raise RuntimeError("the worker processes were stopped")  # nobody waits for this
