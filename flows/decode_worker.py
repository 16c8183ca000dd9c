"""Image bytes to what a model's transform makes of them; `main` is the process that does it.

A process is started with a socket and a piece of shared memory (`flows.decoders`). It imports neither torch nor the
lake unless a transform needs them, so it is there in a fraction of a second, and it ends when its parent has.
"""

from __future__ import annotations

import mmap
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from blip_core.errors import DecodeError
from blip_core.transforms import decode_for

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What one transform gives for every picture."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of one picture."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def arrays(memory: Any, layouts: Sequence[Layout], num_images: int) -> list[np.ndarray]:
    """The arrays (num_images, *shape) that lie one after the other in `memory`."""
    found, start = [], 0
    for layout in layouts:
        dtype = np.dtype(layout.dtype)
        count = num_images * int(np.prod(layout.shape))
        flat = np.frombuffer(memory, dtype=dtype, count=count, offset=start)
        found.append(flat.reshape(num_images, *layout.shape))
        start += num_images * layout.num_bytes
    return found


def decode_into(
    out: Sequence[np.ndarray], place: int, data: bytes, transforms: Sequence[Transform]
) -> str | None:
    """Decode one picture and put what each transform makes of it at `place`; what is wrong with it, else None.

    Whatever a picture does to a library, it costs that picture alone.
    """
    try:
        pictures = decode_for(data, transforms)
        for array, transform, picture in zip(out, transforms, pictures, strict=True):
            array[place] = made_by(transform, picture)
    except DecodeError as err:
        return str(err)
    except Exception as err:  # noqa: BLE001 - a library's complaint about one picture, whatever it is
        return f"{type(err).__name__}: {err}"
    return None


def made_by(transform: Transform, picture: Image.Image) -> np.ndarray:
    """What a transform makes of a picture; bytes where it can give them before they are normalised."""
    pixels = getattr(transform, "pixels", None)
    if pixels is not None:
        return np.asarray(pixels(picture))
    tensor = transform(picture)
    return np.asarray(tensor.detach().cpu().numpy())


def main(socket_fd: int, memory_fd: int) -> None:
    """Decode what comes through the socket until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to answer; its end is ours
    connection = Connection(socket_fd)
    memory = mmap.mmap(memory_fd, 0)
    try:
        transforms, layouts, most = pickle.loads(connection.recv_bytes())
        out = arrays(memory, layouts, most)
        while True:
            images: list[bytes] = connection.recv()
            began = time.perf_counter()
            errors = [decode_into(out, i, data, transforms) for i, data in enumerate(images)]
            connection.send((errors, time.perf_counter() - began))
    except (EOFError, ConnectionError):
        return
