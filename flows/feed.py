"""From a training set in the lake to batches: a pure function of (seed, step).

Nothing but the step says which rows a batch holds and how they are augmented, so a resumed run
goes on with the batch that the killed one would have made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from blip_core import Batch, DecodeError, decode_image
from blip_core.distributed import World
from flows.features import FrozenFeatures
from flows.order import EpochOrder
from flows.skipped import SkippedRows
from storage import Lake, TrainRow, TrainSet, read_image

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image, str, np.random.Generator], tuple[torch.Tensor, str]]

BATCHES_AHEAD = 2
TRIES_FOR_A_ROW = 10
"""Undecodable rows in a line after which the training set itself is at fault."""


class TrainFeed:
    """Batches of a training set, decoded ahead of the model by a few threads.

    Rows come in the order of `order`, by default every row once an epoch. A row whose image cannot
    be decoded is counted in `num_skipped`, written to `skipped`, and its place is taken by the next
    row of the order. With `features` no image is decoded: batches hold image tokens of a frozen
    vision encoder, and `transform` is not used.
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
        world: World | None = None,
        features: FrozenFeatures | None = None,
        order: EpochOrder | None = None,
        skipped: SkippedRows | None = None,
    ) -> None:
        self._lake = lake
        self._rows = rows
        self._transform = transform
        self._features = features
        self._batch_size = batch_size
        world = world or World()
        self._own = range(batch_size)[world.own_rows(batch_size // world.size)]
        self._seed = seed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: dict[int, list[Future[tuple[torch.Tensor, str, str]]]] = {}
        self._order = order or EpochOrder(rows, seed=seed)
        self._skipped = skipped
        self.num_skipped = 0

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch reads: all, or as many as there are images."""
        return len(self._order)

    def __call__(self, step: int) -> Batch:
        """Batch `step`: (B, 3, S, S) pixels or (B, P, D) tokens, B captions, B image ids."""
        for ahead in range(step, step + 1 + BATCHES_AHEAD):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._submit(ahead)
        samples = [future.result() for future in self._ahead.pop(step)]
        for stale in [known for known in self._ahead if known < step]:
            del self._ahead[stale]
        self._order.forget_before((step + 1) * self._batch_size)
        inputs, captions, image_ids = zip(*samples, strict=True)
        name = "pixel_values" if self._features is None else "image_embeds"
        images = {name: torch.stack(inputs)}
        return Batch(captions=list(captions), image_ids=list(image_ids), **images)

    def close(self) -> None:
        """Stop the decoding threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> list[Future[tuple[torch.Tensor, str, str]]]:
        first = step * self._batch_size
        return [self._pool.submit(self._sample, first + i) for i in self._own]

    def _sample(self, position: int) -> tuple[torch.Tensor, str, str]:
        for attempt in range(TRIES_FOR_A_ROW):
            number = self._order.row(position + attempt)
            row = self._rows.row(number)
            try:
                return *self._input(number, row, position), row.image_id
            except DecodeError as err:
                self.num_skipped += 1
                if self._skipped is not None:
                    self._skipped.add(position, attempt, row.image_id)
                logger.warning("image %s of shard %s skipped: %s", row.image_id, row.shard, err)
        raise DecodeError(
            f"{TRIES_FOR_A_ROW} images in a line cannot be decoded, the last in shard {row.shard}; "
            "check that the shard is the one that was ingested"
        )

    def _input(self, number: int, row: TrainRow, position: int) -> tuple[torch.Tensor, str]:
        """Pixels or tokens, and the caption."""
        if self._features is not None:
            return self._features.of_row(number), row.caption
        image = decode_image(read_image(self._lake, row.shard, row.offset, row.size))
        rng = np.random.default_rng((self._seed, 1, position))
        return self._transform(image, row.caption, rng)
