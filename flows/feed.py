"""From a training set in the lake to batches: a pure function of (seed, step).

Nothing but the step says which rows a batch holds and how they are augmented, so a resumed run
goes on with the batch that the killed one would have made.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from blip_core import Batch, DecodeError, decode_image
from storage import Lake, TrainRow, TrainSet, read_image

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image, str, np.random.Generator], tuple[torch.Tensor, str]]

BATCHES_AHEAD = 2
TRIES_FOR_A_ROW = 10
"""Undecodable rows in a line after which the training set itself is at fault."""


class TrainFeed:
    """Batches of a training set, decoded ahead of the model by a few threads.

    A row whose image cannot be decoded is counted in `num_skipped` and its place is taken by
    the next row of the epoch's order.
    """

    def __init__(
        self,
        lake: Lake,
        rows: TrainSet,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        self._lake = lake
        self._rows = rows
        self._transform = transform
        self._batch_size = batch_size
        self._seed = seed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: dict[int, list[Future[tuple[torch.Tensor, str, str]]]] = {}
        self._order: tuple[int, np.ndarray] | None = None
        self._lock = threading.Lock()
        self.num_skipped = 0

    def __call__(self, step: int) -> Batch:
        """The batch of optimizer step `step`: (B, 3, S, S) pixels, B captions, B image ids."""
        for ahead in range(step, step + 1 + BATCHES_AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._submit(ahead)
        samples = [future.result() for future in self._ahead.pop(step)]
        for stale in [known for known in self._ahead if known < step]:
            del self._ahead[stale]
        pixels, captions, image_ids = zip(*samples, strict=True)
        return Batch(
            pixel_values=torch.stack(pixels), captions=list(captions), image_ids=list(image_ids)
        )

    def close(self) -> None:
        """Stop the decoding threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> list[Future[tuple[torch.Tensor, str, str]]]:
        first = step * self._batch_size
        return [self._pool.submit(self._sample, first + i) for i in range(self._batch_size)]

    def _sample(self, position: int) -> tuple[torch.Tensor, str, str]:
        for attempt in range(TRIES_FOR_A_ROW):
            row = self._row(position + attempt)
            rng = np.random.default_rng((self._seed, 1, position))
            try:
                image = decode_image(read_image(self._lake, row.shard, row.offset, row.size))
            except DecodeError as err:
                self.num_skipped += 1
                logger.warning("image %s of shard %s skipped: %s", row.image_id, row.shard, err)
                continue
            pixels, caption = self._transform(image, row.caption, rng)
            return pixels, caption, row.image_id
        raise DecodeError(
            f"{TRIES_FOR_A_ROW} images in a line cannot be decoded, the last in shard {row.shard}; "
            "check that the shard is the one that was ingested"
        )

    def _row(self, position: int) -> TrainRow:
        epoch, place = divmod(position, len(self._rows))
        with self._lock:
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng((self._seed, 0, epoch))
                self._order = (epoch, rng.permutation(len(self._rows)))
            return self._rows.row(int(self._order[1][place]))
