"""Image tokens of a vision encoder that is not trained: computed once, read in every epoch.

An image's place in the file is the number of images before it that could be decoded. A run that
was killed while the file was written makes it anew: images are encoded in the same batches every
time, and so to the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from blip_core import MED, DecodeError, EvalTransform
from flows.session import Run
from flows.steps.batches import image_batches
from flows.stream import ImageRow
from storage import TrainSet
from storage.errors import StorageFull

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
        images = _Images(rows)
        shape = (len(images), model.config.vision.num_tokens, model.config.vision.width)
        partial = folder / f"_tmp-{FEATURES}"
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=NUMBERS[dtype], shape=shape)
        _take_space(partial)
        places = np.full(len(images), UNREADABLE, dtype=np.int64)
        place = 0
        for ids, tokens in _encoded(run, images, model, transform, dtype):
            out[place : place + len(ids)] = tokens
            places[ids] = np.arange(place, place + len(ids))
            place += len(ids)
            on_progress(place, len(images))
        out.flush()
        np.save(folder / PLACES, images.of_rows(places))
        partial.replace(folder / FEATURES)
    return FrozenFeatures(folder)


def _take_space(path: Path) -> None:
    """Claim a mapped file's blocks: a full disk is an error now, and would be a dead process later."""
    size = path.stat().st_size
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as err:
        path.unlink()
        raise StorageFull(
            f"the tokens of frozen vision take {size / 2**30:.2f} GiB in {path.parent}, which are not "
            f"there ({err.strerror}); make room, or set cache_vision: false"
        ) from err


class _Images(Sequence[ImageRow]):
    """The distinct images of a training set in order, each read when it is asked for."""

    def __init__(self, rows: TrainSet) -> None:
        self._rows = rows
        self._starts = rows.image_starts()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, number: int) -> ImageRow: ...
    @overload
    def __getitem__(self, number: slice) -> list[ImageRow]: ...
    def __getitem__(self, number: int | slice) -> ImageRow | list[ImageRow]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self._rows.row(int(self._starts[number]))
        return ImageRow(image_id=row.image_id, shard=row.shard, offset=row.offset, size=row.size)

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """(I,) a value of each image -> (N,) the value of each row's image."""
        ends = np.append(self._starts[1:], len(self._rows))
        return np.repeat(values, (ends - self._starts).astype(np.int64))


def _encoded(
    run: Run, images: Sequence[ImageRow], model: MED, transform: EvalTransform, dtype: str
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Numbers of the images that could be decoded, batch by batch, with their tokens (B, P, D)."""
    is_half, first = dtype == "bfloat16", 0
    model.vision.eval()
    for batch in image_batches(run, images, transform, ENCODE_BATCH):
        for row, reason in batch.failed:
            logger.warning("image %s of shard %s skipped: %s", row.image_id, row.shard, reason)
        failed = {row.image_id for row, _ in batch.failed}
        num_images = len(batch.rows) + len(failed)
        numbered = enumerate(images[first : first + num_images], start=first)
        ids = [number for number, image in numbered if image.image_id not in failed]
        first += num_images
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
        yield ids, numbers
