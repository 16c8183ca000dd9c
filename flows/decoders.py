"""Decoding beside the model: a few threads, each with a process of its own where that pays.

A process that dies is noticed by its closed socket and replaced; what it was at is done again. A picture that
takes its process with it every time is an error of that picture and of no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from typing import IO, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image

from flows.decode_worker import Layout, Transform, arrays, decode_into, made_by
from storage.worker_process import WorkerGone, WorkerProcess

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_IMAGES = 16
"""Images that a process decodes at a time."""
TRIES = 2
"""How often a chunk is given to a process before it is taken apart."""
SILENCE_S = 300.0
"""A process that says nothing for so long over one chunk is taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A chunk of pictures: what each transform made of them, (k, ...) a transform, and what went wrong."""

    pixels: list[torch.Tensor]
    errors: list[str | None]
    seconds: float


@dataclass(slots=True)
class _Process:
    """A decoding process, and the arrays in the memory that both see."""

    worker: WorkerProcess
    out: list[np.ndarray]


class Decoders:
    """A pool that decodes chunks of at most CHUNK_IMAGES pictures; `close` it, or use it as a context."""

    def __init__(
        self, transforms: Sequence[Transform], *, workers: int, processes: bool = False
    ) -> None:
        """`workers` threads; with `processes` each has a process of its own, else it decodes itself."""
        self.transforms = list(transforms)
        self.layouts = [_layout_of(transform) for transform in self.transforms]
        self.workers = workers
        self._uses_processes = processes
        # A thread's own setting: resizing must not ask for the cores that the model computes on.
        one_core = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(workers, "decode", initializer=one_core)
        self._own = threading.local()
        self._all: list[_Process] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def image_bytes(self) -> int:
        """Bytes that one decoded image takes."""
        return sum(layout.num_bytes for layout in self.layouts)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that are there."""
        with self._lock:
            return [process.worker.pid for process in self._all]

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `work` in one of the threads; it may call `decode`."""
        return self._pool.submit(work, *args, **kwargs)

    def decode(self, images: list[bytes]) -> Decoded:
        """Decode a chunk; call it in a thread of this pool, or in any other without processes."""
        if not images:
            return Decoded(pixels=[], errors=[], seconds=0.0)
        if self._uses_processes:
            return self._decode_in_process(images)
        began = time.perf_counter()
        out = [np.empty((len(images), *each.shape), each.dtype) for each in self.layouts]
        errors = [
            decode_into(out, place, data, self.transforms) for place, data in enumerate(images)
        ]
        seconds = time.perf_counter() - began
        return Decoded(pixels=_tensors(out), errors=errors, seconds=seconds)

    def close(self) -> None:
        """Stop threads and processes; what was not begun is dropped."""
        with self._lock:
            self._is_closed = True
            processes, self._all = self._all, []
        for process in processes:
            process.worker.kill()  # it has nothing to lose, and a thread may be waiting for its answer
        self._pool.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            process.worker.end()
        # What a thread sets for itself, torch also takes for threads that are yet to come: not for ever.
        torch.set_num_threads(torch.get_num_threads())

    def _decode_in_process(self, images: list[bytes]) -> Decoded:
        for _ in range(TRIES):
            process: _Process | None = getattr(self._own, "process", None)
            if process is None:
                process = self._own.process = self._start()
            try:
                errors, seconds = process.worker.ask(images, SILENCE_S)
                pixels = _tensors([array[: len(images)].copy() for array in process.out])
                return Decoded(pixels=pixels, errors=errors, seconds=seconds)
            except WorkerGone as err:
                self._own.process = None
                self._bury(process, err)
        if len(images) == 1:
            return self._given_up()
        middle = len(images) // 2
        halves = [self._decode_in_process(half) for half in (images[:middle], images[middle:])]
        return Decoded(
            pixels=[
                torch.cat(pair) for pair in zip(*(half.pixels for half in halves), strict=True)
            ],
            errors=[error for half in halves for error in half.errors],
            seconds=sum(half.seconds for half in halves),
        )

    def _given_up(self) -> Decoded:
        """One picture that ended its process every time."""
        pixels = [torch.from_numpy(np.zeros((1, *each.shape), each.dtype)) for each in self.layouts]
        return Decoded(pixels=pixels, errors=["the process that decoded it died"], seconds=0.0)

    def _start(self) -> _Process:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("decoding was stopped")  # nobody waits for this
            process = _started(self.transforms, self.layouts)
            self._all.append(process)
        return process

    def _bury(self, process: _Process, why: WorkerGone) -> None:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("decoding was stopped")
            self._all.remove(process)
        status = process.worker.end()
        logger.warning(
            "decoding process %d ended with status %d (%s); its images are decoded again",
            process.worker.pid,
            status,
            why,
        )


def _layout_of(transform: Transform) -> Layout:
    """What a transform gives, by trying it on a grey picture."""
    made = made_by(transform, Image.new("RGB", (32, 32), (128, 128, 128)))
    return Layout(shape=made.shape, dtype=made.dtype.str)


def _tensors(made: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in made]


def _started(transforms: Sequence[Transform], layouts: Sequence[Layout]) -> _Process:
    num_bytes = CHUNK_IMAGES * sum(layout.num_bytes for layout in layouts)
    with _nameless_file() as file:
        file.truncate(num_bytes)
        memory = mmap(file.fileno(), num_bytes)
        worker = WorkerProcess("flows.decode_worker", file.fileno())
    with contextlib.suppress(WorkerGone):  # one that died at once is noticed when it is asked
        worker.tell((list(transforms), list(layouts), CHUNK_IMAGES))
    return _Process(worker, arrays(memory, layouts, CHUNK_IMAGES))


def _nameless_file() -> IO[bytes]:
    """A file in memory that goes with the last process that has it open, however that ends.

    Not in /dev/shm, which a container often limits to 64 MiB.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("decoded"), "r+b")
    return tempfile.TemporaryFile(prefix="decoded-")
