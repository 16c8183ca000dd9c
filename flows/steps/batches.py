"""Batches of decoded images, and the rule that a failure costs one row, not its neighbours."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import torch

from blip_core import ImageTransform
from flows.batch_size import free_memory, is_out_of_memory
from flows.decoders import Decoders
from flows.session import Run
from flows.stream import ImageRow, ImageStream, Picture
from storage import Counts
from storage.schemas import OK, schema_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """Decoded images (B, 3, S, S) with their rows, and the rows that could not be decoded."""

    rows: tuple[ImageRow, ...]
    pixel_values: torch.Tensor | None
    """None when no image of the batch could be decoded."""
    failed: tuple[tuple[ImageRow, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Images that belong to no shard's work."""

    images: Sequence[ImageRow]


def image_batches(
    run: Run, rows: Sequence[ImageRow], transform: ImageTransform, batch_size: int
) -> Iterator[ImageBatch]:
    """Images in the order of `rows`, read and decoded by threads ahead of the model.

    An image that its shard has lost is one of the failed, like one that cannot be decoded.
    """
    workers = max(1, run.settings.machine.decode_workers)
    jobs = iter([_Rows(images=rows)])
    held: list[Picture] = []
    with (
        Decoders([transform], workers=workers) as decoders,
        ImageStream(run.lake, jobs, decoders, ahead=2 * batch_size) as stream,
    ):
        for piece in stream:
            held += piece.pictures
            while len(held) >= batch_size or (piece.is_last and held):
                yield _gather(held[:batch_size], transform)
                del held[:batch_size]


def _gather(pictures: list[Picture], transform: ImageTransform) -> ImageBatch:
    good = [picture for picture in pictures if picture.error is None]
    return ImageBatch(
        rows=tuple(picture.row for picture in good),
        pixel_values=batched([picture.pixels[0] for picture in good], transform) if good else None,
        failed=tuple((each.row, each.error) for each in pictures if each.error is not None),
    )


def batched(
    pixels: Sequence[torch.Tensor], transform: ImageTransform, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """B images as decoders gave them -> (B, 3, S, S) on the device, as `transform` would have given them."""
    batch = torch.stack(list(pixels))
    if torch.device(device).type == "cuda":
        # Bytes go over, numbers are made there: a quarter of the traffic, and the copy does not block.
        batch = batch.pin_memory().to(device, non_blocking=True)
    normalise = getattr(transform, "normalise", None)
    return batch if normalise is None else normalise(batch)


def isolate(
    work: Callable[[list[T]], list[R]],
    items: list[T],
    ran_out: Callable[[int], None] | None = None,
) -> list[R | Exception]:
    """`work(items)`, halved on failure until the item that fails is alone (invariant 8).

    The failing item's place holds its exception; running out of memory halves too, and is told to `ran_out`
    with the size that was too much. A device that is broken, or a batch of several in which nothing
    succeeds, is no poison row: it is raised.
    """
    results = _halved(work, items, ran_out)
    failures = [result for result in results if isinstance(result, Exception)]
    if len(items) > 1 and len(failures) == len(items):
        raise failures[-1]
    return results


def _halved(
    work: Callable[[list[T]], list[R]], items: list[T], ran_out: Callable[[int], None] | None
) -> list[R | Exception]:
    if not items:
        return []
    try:
        return list(work(items))
    except (RuntimeError, ValueError, IndexError, FloatingPointError, MemoryError) as err:
        broken = isinstance(err, torch.AcceleratorError)
        if broken and not isinstance(err, torch.OutOfMemoryError):
            raise
        failure = err.with_traceback(None)  # its frames hold the batch that did not fit
    if is_out_of_memory(failure):
        free_memory()
        if ran_out is not None:
            ran_out(len(items))
    if len(items) == 1:
        logger.warning("one row failed alone: %s", failure)
        return [failure]
    middle = len(items) // 2
    logger.info("a batch of %d failed (%s); halving it", len(items), failure)
    halves = (items[:middle], items[middle:])
    return [result for half in halves for result in _halved(work, half, ran_out)]


def counts_of(statuses: Sequence[str]) -> Counts:
    """Rows by outcome, as a manifest records them."""
    reasons = Counter(status for status in statuses if status != OK)
    return Counts(
        num_in=len(statuses),
        num_ok=len(statuses) - reasons.total(),
        reasons=dict(sorted(reasons.items())),
    )


def rows_table(table: str, records: list[dict[str, Any]]) -> pa.Table:
    """One shard's rows as Arrow; no row at all is an empty table with the right columns."""
    schema = schema_of(table)
    return pa.Table.from_pylist(records, schema=schema) if records else schema.empty_table()
