"""Batches of decoded images, and the rule that a failure costs one row, not its neighbours."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import torch

from blip_core import DecodeError, EvalTransform, decode_image
from flows.session import Run
from storage import Counts, read_image
from storage.schemas import OK, schema_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image of a shard: where its bytes are."""

    image_id: str
    shard: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """Decoded images (B, 3, S, S) with their rows, and the rows that could not be decoded."""

    rows: tuple[ImageRow, ...]
    pixel_values: torch.Tensor | None
    """None when no image of the batch could be decoded."""
    failed: tuple[tuple[ImageRow, str], ...]


def image_batches(
    run: Run, rows: Sequence[ImageRow], transform: EvalTransform, batch_size: int
) -> Iterator[ImageBatch]:
    """Images in the order of `rows`, read and decoded by threads ahead of the model."""

    def decode(row: ImageRow) -> torch.Tensor | str:
        try:
            data = read_image(run.lake, row.shard, row.offset, row.size)
            return transform(decode_image(data))
        except DecodeError as err:
            return str(err)

    starts = range(0, len(rows), batch_size)
    with ThreadPoolExecutor(run.settings.machine.decode_workers) as pool:
        ahead: deque[tuple[Sequence[ImageRow], list[Future[torch.Tensor | str]]]] = deque()
        for start in starts:
            chunk = rows[start : start + batch_size]
            ahead.append((chunk, [pool.submit(decode, row) for row in chunk]))
            if len(ahead) > BATCHES_AHEAD:
                yield _gather(*ahead.popleft())
        while ahead:
            yield _gather(*ahead.popleft())


def _gather(chunk: Sequence[ImageRow], futures: list[Future[torch.Tensor | str]]) -> ImageBatch:
    results = [(row, future.result()) for row, future in zip(chunk, futures, strict=True)]
    good = [(row, result) for row, result in results if isinstance(result, torch.Tensor)]
    return ImageBatch(
        rows=tuple(row for row, _ in good),
        pixel_values=torch.stack([pixels for _, pixels in good]) if good else None,
        failed=tuple((row, result) for row, result in results if isinstance(result, str)),
    )


def isolate(work: Callable[[list[T]], list[R]], items: list[T]) -> list[R | Exception]:
    """`work(items)`, halved on failure until the item that fails is alone (invariant 8).

    The failing item's place holds its exception; running out of memory halves too. A device that
    is broken, or a batch of several in which nothing succeeds, is no poison row: it is raised.
    """
    results = _halved(work, items)
    failures = [result for result in results if isinstance(result, Exception)]
    if len(items) > 1 and len(failures) == len(items):
        raise failures[-1]
    return results


def _halved(work: Callable[[list[T]], list[R]], items: list[T]) -> list[R | Exception]:
    if not items:
        return []
    try:
        return list(work(items))
    except (RuntimeError, ValueError, IndexError, FloatingPointError) as err:
        broken = isinstance(err, torch.AcceleratorError)
        if broken and not isinstance(err, torch.OutOfMemoryError):
            raise
        if len(items) == 1:
            logger.warning("one row failed alone: %s", err)
            return [err]
        middle = len(items) // 2
        logger.info("a batch of %d failed (%s); halving it", len(items), err)
        return [*_halved(work, items[:middle]), *_halved(work, items[middle:])]


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
