"""Captioning: every web image of a shard gets k new captions (paper, section 3.3)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from blip_core import CaptionConfig, GeneratedCaption, MEDCaptioner
from flows import models
from flows.session import Run
from flows.steps.batches import ImageRow, counts_of, image_batches, isolate, rows_table
from storage import (
    Clock,
    ModelRef,
    PartRef,
    basis_of,
    caption_id,
    commit_part,
    committed_part,
    fingerprint,
    read_part,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 2


def caption_shard(
    run: Run, pairs: PartRef, captioner: ModelRef, on_progress: Callable[[int], None]
) -> tuple[PartRef, bool]:
    """Caption the ok web images of one pairs part; returns the part and whether it was built.

    Captions are seeded by (seed, image_id, index). An image that cannot be decoded, and a caption
    that comes out empty, is a row with a status and no text.
    """
    images = web_images(run, pairs)
    settings = run.settings.caption.model_dump(mode="json", exclude={"batch_size"})
    config = settings | {"seed": run.settings.seed}
    # By content: a shard that was dropped and fetched anew may hold other images.
    inputs = [fingerprint("images", 1, {"image_ids": [row.image_id for row in images]}, [])]
    basis = basis_of("caption", STAGE_VERSION, config, inputs, captioner.model_id)
    existing = committed_part(
        run.lake, "captions", pairs.name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if existing is not None:
        return existing, False
    clock = Clock()
    records = _caption_images(run, images, captioner, on_progress)
    counts = counts_of([record["status"] for record in records])
    part = commit_part(
        run.lake,
        "captions",
        pairs.name,
        rows_table("captions", records),
        round=run.round,
        basis=basis,
        counts=counts,
        clock=clock,
    )
    logger.info(
        "round %d shard %s: %d captions for %d images, %d without text",
        run.round,
        pairs.name,
        counts.num_ok,
        len(images),
        counts.num_in - counts.num_ok,
    )
    return part, True


def web_images(run: Run, pairs: PartRef) -> list[ImageRow]:
    """The ok web images of a pairs part, in row order."""
    columns = ["image_id", "shard", "offset", "size", "status", "pool"]
    table = read_part(run.lake, pairs, columns)
    return [
        ImageRow(
            image_id=row["image_id"], shard=row["shard"], offset=row["offset"], size=row["size"]
        )
        for row in table.to_pylist()
        if row["status"] == "ok" and row["pool"] == "web"
    ]


def _caption_images(
    run: Run, images: list[ImageRow], captioner: ModelRef, on_progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    settings = run.settings.caption
    loaded = models.load(run, captioner)
    fields = settings.model_dump(exclude={"batch_size"})
    config = CaptionConfig(seed=run.settings.seed, **fields)
    writer = MEDCaptioner(loaded.model, loaded.tokenizer, config, device=run.device)
    transform = models.eval_transform(run, loaded)
    records: list[dict[str, Any]] = []
    for batch in image_batches(run, images, transform, settings.batch_size):
        for row, error in batch.failed:
            records.append(_failed(run, row.image_id, captioner, "decode_error", error))
        if batch.pixel_values is None:
            continue
        pixels = batch.pixel_values

        def write(places: list[int], pixels: Any = pixels, rows: Any = batch.rows) -> list[Any]:
            return writer.caption(pixels[places], [rows[place].image_id for place in places])

        results = isolate(write, list(range(len(batch.rows))))
        for row, result in zip(batch.rows, results, strict=True):
            if isinstance(result, Exception):
                records.append(_failed(run, row.image_id, captioner, "model_error", str(result)))
            else:
                records.extend(_records_of(run, row.image_id, captioner, result))
        on_progress(len(batch.rows) + len(batch.failed))
    return records


def _records_of(
    run: Run, image_id: str, captioner: ModelRef, captions: list[GeneratedCaption]
) -> list[dict[str, Any]]:
    """One row for each caption; the same words twice for one image are one caption."""
    records, seen = [], set()
    for index, caption in enumerate(captions):
        text = caption.text.strip()
        record = _record(run, image_id, captioner, index, text)
        record |= {
            "num_tokens": caption.num_tokens,
            "mean_logprob": caption.mean_logprob if math.isfinite(caption.mean_logprob) else None,
            "finish_reason": caption.finish_reason,
        }
        if not text:
            record |= {"status": "empty", "caption": None}
        elif text in seen:
            record["status"] = "repeated"
        seen.add(text)
        records.append(record)
    return records


def _record(run: Run, image_id: str, captioner: ModelRef, index: int, text: str) -> dict[str, Any]:
    settings = run.settings.caption
    return {
        "caption_id": caption_id(image_id, "synthetic", text),
        "image_id": image_id,
        "source": "synthetic",
        "caption": text,
        "model_id": captioner.model_id,
        "top_p": settings.top_p if settings.decoding == "nucleus" else None,
        "seed": run.settings.seed,
        "index": index,
        "status": "ok",
        "round": run.round,
    }


def _failed(
    run: Run, image_id: str, captioner: ModelRef, status: str, error: str
) -> dict[str, Any]:
    logger.warning("image %s got no caption: %s", image_id, error)
    return _record(run, image_id, captioner, 0, "") | {"status": status, "caption": None}
