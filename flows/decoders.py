"""Decoding beside the model: a few threads, each with a process of its own where that pays.

A process that dies is noticed by its closed socket and replaced; what it was at is done again. A picture that
takes its process with it every time is an error of that picture and of no other.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
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
from storage.worker_pool import WorkerPool
from storage.worker_process import WorkerGone, WorkerProcess

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_IMAGES = 16
"""Images that a process decodes at a time."""
SILENCE_S = 300.0
"""A process that says nothing for so long over one chunk is taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A chunk of pictures: what each transform made of them, (k, ...) a transform, and what went wrong."""

    pixels: list[torch.Tensor]
    errors: list[str | None]
    seconds: float


class _Process(WorkerProcess):
    """A decoding process, and the arrays in the memory that both see."""

    def __init__(self, transforms: Sequence[Transform], layouts: Sequence[Layout]) -> None:
        num_bytes = CHUNK_IMAGES * sum(layout.num_bytes for layout in layouts)
        with _nameless_file() as file:
            file.truncate(num_bytes)
            memory = mmap(file.fileno(), num_bytes)
            super().__init__("flows.decode_worker", file.fileno())
        self.out = arrays(memory, layouts, CHUNK_IMAGES)
        with contextlib.suppress(WorkerGone):  # one that died at once is noticed when it is asked
            self.tell((list(transforms), list(layouts), CHUNK_IMAGES))


class Decoders:
    """A pool that decodes chunks of at most CHUNK_IMAGES pictures; `close` it, or use it as a context."""

    def __init__(
        self, transforms: Sequence[Transform], *, workers: int, processes: bool = False
    ) -> None:
        """`workers` threads; with `processes` each has a process of its own, else it decodes itself."""
        self.transforms = list(transforms)
        self.layouts = [_layout_of(transform) for transform in self.transforms]
        self.workers = workers
        self._processes = WorkerPool(self._started, "decodes pictures") if processes else None
        # A thread's own setting: resizing must not ask for the cores that the model computes on.
        one_core = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(workers, "decode", initializer=one_core)

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
        return self._processes.pids if self._processes is not None else []

    def submit(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `work` in one of the threads; it may call `decode`."""
        return self._pool.submit(work, *args, **kwargs)

    def decode(self, images: list[bytes]) -> Decoded:
        """Decode a chunk; call it in a thread of this pool, or in any other without processes."""
        if not images:
            return Decoded(pixels=[], errors=[], seconds=0.0)
        if self._processes is not None:
            return _joined(list(self._processes.answers(images, _ask, self._given_up)))
        began = time.perf_counter()
        out = [np.empty((len(images), *each.shape), each.dtype) for each in self.layouts]
        errors = [
            decode_into(out, place, data, self.transforms) for place, data in enumerate(images)
        ]
        seconds = time.perf_counter() - began
        return Decoded(pixels=_tensors(out), errors=errors, seconds=seconds)

    def close(self) -> None:
        """Stop threads and processes; what was not begun is dropped."""
        if self._processes is not None:
            self._processes.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._processes is not None:
            self._processes.join()
        # What a thread sets for itself, torch also takes for threads that are yet to come: not for ever.
        torch.set_num_threads(torch.get_num_threads())

    def _started(self) -> _Process:
        return _Process(self.transforms, self.layouts)

    def _given_up(self, image: bytes) -> Decoded:
        """One picture that ended its process every time."""
        pixels = [torch.from_numpy(np.zeros((1, *each.shape), each.dtype)) for each in self.layouts]
        return Decoded(pixels=pixels, errors=["the process that decoded it died"], seconds=0.0)


def _ask(process: _Process, images: list[bytes]) -> Decoded:
    errors, seconds = process.ask(images, SILENCE_S)
    pixels = _tensors([array[: len(images)].copy() for array in process.out])
    return Decoded(pixels=pixels, errors=errors, seconds=seconds)


def _joined(parts: list[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]
    return Decoded(
        pixels=[torch.cat(each) for each in zip(*(part.pixels for part in parts), strict=True)],
        errors=[error for part in parts for error in part.errors],
        seconds=sum(part.seconds for part in parts),
    )


def _layout_of(transform: Transform) -> Layout:
    """What a transform gives, by trying it on a grey picture."""
    made = made_by(transform, Image.new("RGB", (32, 32), (128, 128, 128)))
    return Layout(shape=made.shape, dtype=made.dtype.str)


def _tensors(made: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in made]


def _nameless_file() -> IO[bytes]:
    """A file in memory that goes with the last process that has it open, however that ends.

    Not in /dev/shm, which a container often limits to 64 MiB.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("decoded"), "r+b")
    return tempfile.TemporaryFile(prefix="decoded-")
