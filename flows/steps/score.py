"""Scoring: the filter's itm_prob and itc_sim for every web and synthetic text of a shard."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from blip_core import MEDScorer, PairScore
from flows import models
from flows.errors import MissingInput
from flows.session import Run
from flows.steps.batches import ImageBatch, counts_of, image_batches, isolate, rows_table
from flows.steps.caption import web_images
from storage import (
    Clock,
    ModelRef,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    fingerprint,
    read_part,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 1

Text = tuple[str, str]
"""(caption_id, caption)."""


def score_shard(
    run: Run, pairs: PartRef, scorer: ModelRef, on_progress: Callable[[int], None]
) -> tuple[PartRef, bool]:
    """Score the web and synthetic captions of one pairs part; the image is encoded once for all.

    Returns the part and whether it was built. The text of a failed row is a row with its error.
    """
    texts_of = _texts_by_image(run, pairs)
    ids = sorted(text[0] for texts in texts_of.values() for text in texts)
    inputs = [fingerprint("captions", 1, {"caption_ids": ids}, [])]
    config = run.settings.score.model_dump(mode="json", exclude={"batch_size"})
    basis = basis_of("score", STAGE_VERSION, config, inputs, scorer.model_id)
    existing = committed_part(
        run.lake, "scores", pairs.name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if existing is not None:
        return existing, False
    clock = Clock()
    records = _score_images(run, pairs, texts_of, scorer, on_progress)
    counts = counts_of([record["status"] for record in records])
    part = commit_part(
        run.lake,
        "scores",
        pairs.name,
        rows_table("scores", records),
        round=run.round,
        basis=basis,
        counts=counts,
        clock=clock,
    )
    logger.info(
        "round %d shard %s: %d texts of %d images scored, %d failed",
        run.round,
        pairs.name,
        counts.num_ok,
        len(texts_of),
        counts.num_in - counts.num_ok,
    )
    return part, True


def _texts_by_image(run: Run, pairs: PartRef) -> dict[str, list[Text]]:
    """The ok captions of a pairs part by image, web first. MissingInput before captioning."""
    texts: dict[str, list[Text]] = {}
    for number in (0, run.round):
        part = committed_part(run.lake, "captions", pairs.name, round=number)
        if part is None:
            raise MissingInput(
                f"shard {pairs.name} has no captions of round {number}; run "
                f"`bootstrap {'caption' if number else 'ingest'}` first"
            )
        table = read_part(run.lake, part, ["caption_id", "image_id", "caption", "status"])
        for row in table.to_pylist():
            if row["status"] == "ok":
                texts.setdefault(row["image_id"], []).append((row["caption_id"], row["caption"]))
    return texts


def _score_images(
    run: Run,
    pairs: PartRef,
    texts_of: dict[str, list[Text]],
    scorer: ModelRef,
    on_progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    settings = run.settings.score
    loaded = models.load(run, scorer)
    judge = MEDScorer(
        loaded.model, loaded.tokenizer, device=run.device, max_text_tokens=settings.max_text_tokens
    )
    transform = models.eval_transform(run, loaded)
    images = [row for row in web_images(run, pairs) if row.image_id in texts_of]
    records: list[dict[str, Any]] = []
    for batch in image_batches(run, images, transform, settings.batch_size):
        records.extend(
            _failed(run, row.image_id, text, scorer, "decode_error", error)
            for row, error in batch.failed
            for text in texts_of[row.image_id]
        )
        records.extend(_score_batch(run, batch, texts_of, judge, scorer))
        on_progress(len(batch.rows) + len(batch.failed))
    return records


def _score_batch(
    run: Run, batch: ImageBatch, texts_of: dict[str, list[Text]], judge: MEDScorer, scorer: ModelRef
) -> list[dict[str, Any]]:
    if batch.pixel_values is None:
        return []
    pixels = batch.pixel_values

    def score(places: list[int]) -> list[Any]:
        wanted = [[text for _, text in texts_of[batch.rows[place].image_id]] for place in places]
        return judge.score(pixels[places], wanted)

    records = []
    results = isolate(score, list(range(len(batch.rows))))
    for row, result in zip(batch.rows, results, strict=True):
        texts = texts_of[row.image_id]
        if isinstance(result, Exception):
            for text in texts:
                failed = _failed(run, row.image_id, text, scorer, "model_error", str(result))
                records.append(failed)
            continue
        for text, pair in zip(texts, result, strict=True):
            problem = _not_finite(pair)
            if problem is not None:
                failed = _failed(run, row.image_id, text, scorer, "model_error", problem)
                records.append(failed)
                continue
            record = _record(run, row.image_id, text, scorer)
            records.append(record | {"itm_prob": pair.itm_prob, "itc_sim": pair.itc_sim})
    return records


def _not_finite(pair: PairScore) -> str | None:
    """What is wrong with a score; None when nothing is."""
    numbers = {"itm_prob": pair.itm_prob, "itc_sim": pair.itc_sim}
    bad = [
        name for name, value in numbers.items() if value is not None and not math.isfinite(value)
    ]
    return f"{' and '.join(bad)} not finite" if bad else None


def _record(run: Run, image_id: str, text: Text, scorer: ModelRef) -> dict[str, Any]:
    return {
        "caption_id": text[0],
        "image_id": image_id,
        "model_id": scorer.model_id,
        "itm_prob": None,
        "itc_sim": None,
        "status": "ok",
        "error": None,
        "round": run.round,
    }


def _failed(
    run: Run, image_id: str, text: Text, scorer: ModelRef, status: str, error: str
) -> dict[str, Any]:
    return _record(run, image_id, text, scorer) | {"status": status, "error": error}
