"""Canaries scored: pairs whose truth is known, by the round's scorer and by the frozen judge."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from blip_core import PairScore, Scorer
from flows import models
from flows.audit.planting import CanaryImage, Planted, plant, stratum, texts_of
from flows.errors import MissingInput
from flows.foreign_models import basis_fields
from flows.session import Run
from flows.settings import curate_basis
from flows.steps.batches import image_batches, rows_table
from flows.stream import ImageRow
from storage import (
    Clock,
    PartRef,
    basis_of,
    caption_id,
    commit_part,
    committed_part,
    connect,
    fingerprint,
)
from storage.canaries import images_needed

logger = logging.getLogger(__name__)

STAGE_VERSION = 1
PART = "canaries"
BATCH_IMAGES = 64

_CANARY_IMAGES = """
SELECT p.image_id, any_value(p.shard), any_value(p."offset"), any_value(p.size),
       list(DISTINCT c.caption ORDER BY c.caption)
FROM canary_draws d
JOIN pairs p ON p.image_id = d.image_id AND p.pool = 'human' AND p.status = 'ok'
JOIN captions c ON c.image_id = d.image_id AND c.source = 'human' AND c.status = 'ok'
WHERE d.is_canary
GROUP BY p.image_id ORDER BY p.image_id
"""
_HUMAN_TEXTS = """
SELECT DISTINCT caption FROM captions WHERE source = 'human' AND status = 'ok' ORDER BY caption
"""


def score_canaries(run: Run) -> PartRef:
    """Score the canaries with the round's scorer and the judge, or find them scored; one part of `canaries`.

    Raises:
        MissingInput: the lake has fewer canary images than `audit.min_canary_images`.
    """
    images = canary_images(run)
    require_enough(run, len(images))
    scorer, judge = models.scorer_ref(run), models.judge_ref(run)
    with connect(run.lake) as connection:
        human = [row[0] for row in connection.execute(_HUMAN_TEXTS).fetchall()]
    content = {image.row.image_id: list(image.texts) for image in images}
    basis = basis_of(
        "canaries",
        STAGE_VERSION,
        curate_basis(run.settings.score)
        | basis_fields(scorer)
        | {"seed": run.settings.seed, "judge_id": judge.model_id},
        [
            fingerprint("canary-images", 1, content, []),
            fingerprint("human-texts", 1, {"texts": human}, []),
        ],
        scorer.model_id,
    )
    known = committed_part(
        run.lake, "canaries", PART, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if known is not None:
        return known
    clock = Clock()
    planted = list(plant(images, human, run.settings.seed))
    judging = models.scorer_of(run, judge)
    hardest = _hardest(run, judging, planted)
    texts = [texts_of(each, hard) for each, hard in zip(planted, hardest, strict=True)]
    rows = [each.image.row for each in planted]
    of_judge = _scores(run, judging, rows, texts)
    of_scorer = _scores(run, models.scorer_of(run, scorer), rows, texts)
    records = [
        {
            "caption_id": caption_id(row.image_id, "canary", text),
            "image_id": row.image_id,
            "kind": kind,
            "truth": kind == "true",
            "stratum": stratum(text),
            "caption": text,
            "model_id": scorer.model_id,
            "itm_prob": mine.itm_prob,
            "itc_sim": mine.itc_sim,
            "judge_id": judge.model_id,
            "judge_itm_prob": judged.itm_prob,
            "judge_itc_sim": judged.itc_sim,
            "round": run.round,
        }
        for row, of_image, by_scorer, by_judge in zip(rows, texts, of_scorer, of_judge, strict=True)
        for (kind, text), mine, judged in zip(of_image.items(), by_scorer, by_judge, strict=True)
    ]
    table = rows_table("canaries", records)
    return commit_part(run.lake, "canaries", PART, table, round=run.round, basis=basis, clock=clock)


def canary_images(run: Run) -> list[CanaryImage]:
    """The canary images of the lake, in order of image_id."""
    with connect(run.lake, as_of=run.round) as connection:
        rows = connection.execute(_CANARY_IMAGES).fetchall()
    return [
        CanaryImage(
            row=ImageRow(image_id=image_id, shard=shard, offset=offset, size=size),
            texts=tuple(texts),
        )
        for image_id, shard, offset, size, texts in rows
    ]


def require_enough(run: Run, num_images: int) -> None:
    """Raise MissingInput when there are too few canaries to say anything, with what would be needed."""
    least = run.settings.audit.min_canary_images
    if num_images >= least:
        return
    raise MissingInput(
        f"lake {run.lake.uri} has {num_images} canary images, fewer than audit.min_canary_images {least}: shares "
        f"would be known to +-0.1 with {images_needed(0.1)} images, to +-0.05 with {images_needed(0.05)} and to "
        f"+-0.03 with {images_needed(0.03)}. Give more human pairs or a larger audit.canary_share before the first "
        "round (images that a model was trained on cannot become canaries), or audit.canary_share=0 to do without"
    )


def _hardest(run: Run, judge: Scorer, planted: Sequence[Planted]) -> list[str | None]:
    """For each image the mismatch that the judge finds most alike."""
    candidates = [dict(enumerate(each.candidates)) for each in planted]
    found: list[str | None] = []
    scores = _scores(run, judge, [each.image.row for each in planted], candidates)
    for each, of_image in zip(planted, scores, strict=True):
        numbered = [
            (likeness(score), text) for score, text in zip(of_image, each.candidates, strict=True)
        ]
        found.append(max(numbered)[1] if numbered else None)
    return found


def likeness(score: PairScore) -> float:
    """What a scorer ranks by: the cosine, or the probability of one that has no cosine."""
    number = score.itc_sim if score.itc_sim is not None else score.itm_prob
    assert number is not None, "a scorer gives itm_prob, itc_sim or both"
    return number


def _scores(
    run: Run,
    scorer: Scorer,
    rows: Sequence[ImageRow],
    texts: Sequence[Mapping[Any, str]],
) -> list[list[PairScore]]:
    """Scores of each image's texts. MissingInput when an image cannot be read."""
    found: list[list[PairScore]] = []
    by_image = {row.image_id: list(of.values()) for row, of in zip(rows, texts, strict=True)}
    for batch in image_batches(run, rows, scorer.transform, BATCH_IMAGES):
        for row, error in batch.failed:
            raise MissingInput(
                f"canary image {row.image_id} of shard {row.shard} cannot be read ({error}): run `bootstrap repair`, "
                "then `bootstrap ingest`"
            )
        assert batch.pixel_values is not None, "a batch without failures has pictures"
        found += scorer.score(batch.pixel_values, [by_image[row.image_id] for row in batch.rows])
    return found
