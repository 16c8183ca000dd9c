"""Image tokens of a vision encoder that is not trained: computed once, read in every epoch.

The rows of a training set are sorted by image, so an image's place in the file is the number of
distinct images before it. The file is made anew by a run that was killed while it was written:
images are encoded in the same batches every time, and so to the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from blip_core import MED, DecodeError, EvalTransform
from flows.session import Run
from flows.steps.batches import ImageRow, image_batches
from storage import TrainSet

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64
UNREADABLE = -1
FEATURES = "features.npy"
PLACES = "places.npy"
NUMBERS = {"float32": np.float32, "bfloat16": np.int16}
"""How numbers lie in the file; numpy has no bfloat16, so its bits are kept."""


class FrozenFeatures:
    """Image tokens by row of a training set, from a memory map."""

    def __init__(self, folder: Path) -> None:
        self._features = np.load(folder / FEATURES, mmap_mode="r")
        self._places = np.load(folder / PLACES, mmap_mode="r")

    def of_row(self, row: int) -> torch.Tensor:
        """(P, D) image tokens of row `row`; DecodeError when its image could not be decoded."""
        place = int(self._places[row])
        if place == UNREADABLE:
            raise DecodeError("the image could not be decoded when features were made")
        tokens = torch.from_numpy(self._features[place].copy())
        return tokens.view(torch.bfloat16) if tokens.dtype == torch.int16 else tokens


def frozen_features(
    run: Run,
    rows: TrainSet,
    model: MED,
    transform: EvalTransform,
    folder: Path,
    *,
    dtype: str,
    on_progress: Callable[[int, int], None],
) -> FrozenFeatures:
    """Encode every image of a training set into `folder`, or open what lies there."""
    if not (folder / FEATURES).exists():
        folder.mkdir(parents=True, exist_ok=True)
        images, image_of_row = _distinct(rows)
        shape = (len(images), model.config.vision.num_tokens, model.config.vision.width)
        partial = folder / f"_tmp-{FEATURES}"
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=NUMBERS[dtype], shape=shape)
        places = np.full(len(images), UNREADABLE, dtype=np.int64)
        place = 0
        for ids, tokens in _encoded(run, images, model, transform, dtype):
            out[place : place + len(ids)] = tokens
            places[ids] = np.arange(place, place + len(ids))
            place += len(ids)
            on_progress(place, len(images))
        out.flush()
        np.save(folder / PLACES, places[image_of_row])
        partial.replace(folder / FEATURES)
    return FrozenFeatures(folder)


def _distinct(rows: TrainSet) -> tuple[list[ImageRow], np.ndarray]:
    """The distinct images in order, and for every row the number of its image."""
    images: list[ImageRow] = []
    image_of_row = np.empty(len(rows), dtype=np.int64)
    for i in range(len(rows)):
        row = rows.row(i)
        if not images or images[-1].image_id != row.image_id:
            images.append(
                ImageRow(image_id=row.image_id, shard=row.shard, offset=row.offset, size=row.size)
            )
        image_of_row[i] = len(images) - 1
    return images, image_of_row


def _encoded(
    run: Run, images: list[ImageRow], model: MED, transform: EvalTransform, dtype: str
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Numbers of the images that could be decoded, batch by batch, with their tokens (B, P, D)."""
    number_of = {image.image_id: number for number, image in enumerate(images)}
    is_half = dtype == "bfloat16"
    model.vision.eval()
    for batch in image_batches(run, images, transform, ENCODE_BATCH):
        for row, reason in batch.failed:
            logger.warning("image %s of shard %s skipped: %s", row.image_id, row.shard, reason)
        if batch.pixel_values is None:
            continue
        with (
            torch.no_grad(),
            torch.autocast(run.device.type, torch.bfloat16, enabled=is_half),
        ):
            tokens = model.encode_image(batch.pixel_values.to(run.device)).cpu()
        if is_half:
            numbers = tokens.to(torch.bfloat16).view(torch.int16).numpy()
        else:
            numbers = tokens.float().numpy()
        yield [number_of[row.image_id] for row in batch.rows], numbers
