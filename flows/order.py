"""Which row of a training set is read at which position: a pure function of the seed.

Rows are drawn in a new order every epoch, each once; or images are, each with one of its captions.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flows.errors import SettingsError
from storage import TrainSet
from storage.errors import StorageFull

CaptionsPerEpoch = Literal["all", "one"]

MAPPED_FROM = 1_000_000
"""Numbers from which on an array lies in a file that is mapped, not in memory of its own."""
CHUNK = 1 << 20


class EpochOrder:
    """From positions 0, 1, 2, ... through all epochs to rows. Any number of threads may ask.

    With `captions_per_epoch` "all", an epoch holds every row once. With "one", it holds every image
    once: a source is drawn by its weight among those that the image has captions of, and then one
    of its captions of that source, evenly, by (seed, epoch, image_id).

    Costs 4 bytes for each place of an epoch (8 while two epochs meet), and 4 for each image with
    "one"; 8 each from 2**32 rows on. With `scratch`, a folder, those of MAPPED_FROM places or more
    lie in a file there that no other process sees: page cache, which the system may take back.

    Raises:
        SettingsError: with "one", a row's source has no weight, or an image has only captions of
            weight 0; names them.
        StorageFull: `scratch` has no room.
    """

    def __init__(
        self,
        rows: TrainSet,
        *,
        seed: int,
        captions_per_epoch: CaptionsPerEpoch = "all",
        source_weights: Mapping[str, float] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._rows, self._seed, self._scratch = rows, seed, scratch
        self._starts: np.ndarray | None = None
        self._weights: Mapping[str, float] = {}
        if captions_per_epoch == "one":
            found = rows.image_starts()
            self._starts = self._room(len(found), found.dtype)
            self._starts[:] = found
            self._weights = _checked_weights(rows, self._starts, source_weights)
        self._num_places = len(rows) if self._starts is None else len(self._starts)
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Places of an epoch: rows, or images."""
        return self._num_places

    def row(self, position: int) -> int:
        """Number of the row at `position`, from 0 in epoch 0."""
        epoch, place = divmod(position, self._num_places)
        with self._lock:
            if epoch not in self._epochs:
                order = self._room(self._num_places, np.dtype(self._rows.number_type))
                for first in range(0, self._num_places, CHUNK):
                    part = order[first : first + CHUNK]
                    part[:] = np.arange(first, first + len(part))
                np.random.default_rng((self._seed, 0, epoch)).shuffle(order)
                self._epochs[epoch] = order
            number = int(self._epochs[epoch][place])
        return number if self._starts is None else self._caption(epoch, number, self._starts)

    def forget_before(self, position: int) -> None:
        """Give back the memory of epochs that end before `position`."""
        epoch = position // self._num_places
        with self._lock:
            for past in [known for known in self._epochs if known < epoch]:
                del self._epochs[past]

    def _room(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An array of `count` numbers, not yet filled; mapped when it is large."""
        if self._scratch is None or count < MAPPED_FROM:
            return np.empty(count, dtype)
        size = count * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self._scratch) as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk ends the process later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return np.frombuffer(mmap.mmap(file.fileno(), size), dtype)
        except OSError as err:
            raise StorageFull(
                f"the order of {count} rows takes {size / 2**20:.0f} MiB in {self._scratch}, which are "
                f"not there ({err.strerror}); make room, or set machine.scratch to a folder that has it"
            ) from err

    def _caption(self, epoch: int, image: int, starts: np.ndarray) -> int:
        """The row that is drawn among those of image number `image`."""
        first = int(starts[image])
        end = int(starts[image + 1]) if image + 1 < len(starts) else len(self._rows)
        sources = self._rows.values("source", first, end)
        if len(sources) == 1:
            return first
        image_id = self._rows.values("image_id", first, first + 1)[0]
        digest = hashlib.sha256(f"{self._seed}\0{epoch}\0{image_id}".encode()).digest()
        share = (int.from_bytes(digest[:8]) >> 11) / 2**53
        return first + draw_caption(sources, self._weights, share)


def draw_caption(sources: Sequence[str], weights: Mapping[str, float], share: float) -> int:
    """Which of an image's captions of `sources` lies at `share`, in [0, 1), of their weights.

    Captions of one source share its weight evenly; one of weight 0 is never drawn.
    """
    chances = [weights[source] / sources.count(source) for source in sources]
    left, drawn = share * sum(chances), 0
    for number, chance in enumerate(chances):
        if chance > 0:
            drawn = number
            if left < chance:
                break
            left -= chance
    return drawn


def _checked_weights(
    rows: TrainSet, starts: np.ndarray, weights: Mapping[str, float] | None
) -> Mapping[str, float]:
    """A weight for every source of the rows, none of which leaves an image without a caption."""
    found = rows.distinct("source")
    if weights is None:
        return dict.fromkeys(found, 1.0)
    unknown = [source for source in found if source not in weights]
    if unknown:
        raise SettingsError(
            f"source_weights {dict(weights)} have no weight for {', '.join(map(str, unknown))}, of which this "
            "training set has captions; give one, 0 to draw none of them"
        )
    without = [source for source in found if weights[source] == 0]
    if without:
        drawable = np.logical_or.reduceat(~rows.is_one_of("source", without), starts)
        lost = np.flatnonzero(~drawable)
        if len(lost):
            image_id = rows.row(int(starts[lost[0]])).image_id
            raise SettingsError(
                f"source_weights: {len(lost)} of {len(starts)} images have captions of "
                f"{' and '.join(without)} only, whose weight is 0 (the first: {image_id}); give them "
                "a weight"
            )
    return weights
