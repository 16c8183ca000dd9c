"""Canaries scored: pairs whose truth is known, and what the captioner writes for the same images, by the round's
scorer and by the frozen judge.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import duckdb

from blip_core import ImageTransform, PairScore, Scorer
from flows import models
from flows.audit.agreed_words import AgreedWords
from flows.audit.planting import WRITTEN, CanaryImage, plant, stratum, texts_of
from flows.errors import MissingInput
from flows.foreign_models import basis_fields
from flows.session import Run
from flows.settings import curate_basis
from flows.steps.batches import ImageBatch, image_batches, rows_table
from flows.stream import ImageRow
from storage import (
    Clock,
    ModelRef,
    PartRef,
    basis_of,
    caption_id,
    commit_part,
    committed_part,
    connect,
    fingerprint,
)
from storage.canaries import images_needed
from storage.fingerprint import Basis

logger = logging.getLogger(__name__)

STAGE_VERSION = 1
PART = "canaries"
BATCH_IMAGES = 64

Text = tuple[str, str]
"""kind and text"""

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
SELECT list(DISTINCT caption ORDER BY caption) FROM captions
WHERE source = 'human' AND status = 'ok' GROUP BY image_id ORDER BY image_id
"""


def score_canaries(run: Run) -> PartRef:
    """Score the canaries with the round's scorer and the judge, or find them scored; one part of `canaries`.

    Raises:
        MissingInput: the lake has fewer canary images than `audit.min_canary_images`.
    """
    images = canary_images(run)
    require_enough(run, len(images))
    scorer, judge = models.scorer_ref(run), models.judge_ref(run)
    captioner = models.captioner_ref(run)
    with connect(run.lake) as connection:
        human = human_texts(connection)
    basis = _basis(run, images, human, scorer, judge, captioner)
    known = committed_part(
        run.lake, "canaries", PART, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if known is not None:
        return known
    clock = Clock()
    texts = _texts(run, images, human, models.scorer_of(run, judge), captioner)
    rows = [image.row for image in images]
    of_judge = _scores(run, models.scorer_of(run, judge), rows, texts)
    of_scorer = _scores(run, models.scorer_of(run, scorer), rows, texts)
    agreed = AgreedWords(human)
    records = [
        {
            "caption_id": caption_id(image.row.image_id, kind, text),
            "image_id": image.row.image_id,
            "kind": kind,
            "truth": None if kind == WRITTEN else kind == "true",
            "contradicted": _contradicted(agreed, text, image),
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
        for image, of_image, by_scorer, by_judge in zip(
            images, texts, of_scorer, of_judge, strict=True
        )
        for (kind, text), mine, judged in zip(of_image, by_scorer, by_judge, strict=True)
    ]
    table = rows_table("canaries", records)
    return commit_part(run.lake, "canaries", PART, table, round=run.round, basis=basis, clock=clock)


def _basis(
    run: Run,
    images: Sequence[CanaryImage],
    human: Sequence[Sequence[str]],
    scorer: ModelRef,
    judge: ModelRef,
    captioner: ModelRef,
) -> Basis:
    """What the canaries and their scores are made of."""
    return basis_of(
        "canaries",
        STAGE_VERSION,
        curate_basis(run.settings.score)
        | basis_fields(scorer)
        | curate_basis(run.settings.caption)
        | basis_fields(captioner)
        | {
            "seed": run.settings.seed,
            "judge_id": judge.model_id,
            "captioner_id": captioner.model_id,
        },
        [images_input(images), texts_input(human)],
        scorer.model_id,
    )


def images_input(images: Sequence[CanaryImage]) -> str:
    """The canary images with their texts."""
    content = {image.row.image_id: list(image.texts) for image in images}
    return fingerprint("canary-images", 1, content, [])


def texts_input(human: Sequence[Sequence[str]]) -> str:
    """What people said of all images."""
    return fingerprint("human-texts", 1, {"texts": human}, [])


def human_texts(connection: duckdb.DuckDBPyConnection) -> list[list[str]]:
    """What people said of each image that a connection sees."""
    return [row[0] for row in connection.execute(_HUMAN_TEXTS).fetchall()]


def canary_images(run: Run) -> list[CanaryImage]:
    """The canary images of the lake, in order of image_id."""
    with connect(run.lake, as_of=run.round) as connection:
        return canary_images_of(connection)


def canary_images_of(connection: duckdb.DuckDBPyConnection) -> list[CanaryImage]:
    """The canary images that a connection sees, in order of image_id."""
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
    if num_images < least:
        raise MissingInput(too_few(run.lake.uri, num_images, least))


def too_few(uri: str, num_images: int, least: int) -> str:
    """What is missing, and how much would give which interval."""
    return (
        f"lake {uri} has {num_images} canary images, fewer than audit.min_canary_images {least}: shares would be known "
        f"to +-0.1 with {images_needed(0.1)} images, to +-0.05 with {images_needed(0.05)} and to +-0.03 with "
        f"{images_needed(0.03)}. Give more human pairs or a larger audit.canary_share before the first round (images "
        "that a model was trained on cannot become canaries), or audit.canary_share=0 to do without"
    )


def _contradicted(agreed: AgreedWords, text: str, image: CanaryImage) -> bool | None:
    """Whether all others who captioned the image contradict a text; None when there is nobody to ask."""
    others = [own for own in image.texts if own != text]
    return bool(agreed.contradicted(text, others)) if agreed.words and others else None


def _texts(
    run: Run,
    images: Sequence[CanaryImage],
    human: Sequence[Sequence[str]],
    judge: Scorer,
    captioner: ModelRef,
) -> list[list[Text]]:
    """For each image its texts, as (kind, text): those of known truth, and what the round's captioner writes."""
    planted = list(plant(images, [text for texts in human for text in texts], run.settings.seed))
    candidates = [[(str(i), text) for i, text in enumerate(each.candidates)] for each in planted]
    liked = _scores(run, judge, [each.image.row for each in planted], candidates)
    texts: list[list[Text]] = []
    for each, scores in zip(planted, liked, strict=True):
        numbered = [
            (likeness(score), text) for score, text in zip(scores, each.candidates, strict=True)
        ]
        texts.append(list(texts_of(each, max(numbered)[1] if numbered else None).items()))
    writer = models.captioner_of(run, captioner)
    for batch in _batches(run, [image.row for image in images], writer.transform):
        assert batch.pixel_values is not None, "a batch without failures has pictures"
        ids = [row.image_id for row in batch.rows]
        place = {image.row.image_id: number for number, image in enumerate(images)}
        for image_id, captions in zip(ids, writer.caption(batch.pixel_values, ids), strict=True):
            written = dict.fromkeys(caption.text for caption in captions if caption.text.strip())
            texts[place[image_id]] += [(WRITTEN, text) for text in written]
    return texts


def likeness(score: PairScore) -> float:
    """What a scorer ranks by: the cosine, or the probability of one that has no cosine."""
    number = score.itc_sim if score.itc_sim is not None else score.itm_prob
    assert number is not None, "a scorer gives itm_prob, itc_sim or both"
    return number


def _scores(
    run: Run, scorer: Scorer, rows: Sequence[ImageRow], texts: Sequence[Sequence[Text]]
) -> list[list[PairScore]]:
    """Scores of each image's texts. MissingInput when an image cannot be read."""
    found: list[list[PairScore]] = []
    by_image = {row.image_id: [text for _, text in of] for row, of in zip(rows, texts, strict=True)}
    for batch in _batches(run, rows, scorer.transform):
        assert batch.pixel_values is not None, "a batch without failures has pictures"
        found += scorer.score(batch.pixel_values, [by_image[row.image_id] for row in batch.rows])
    return found


def _batches(run: Run, rows: Sequence[ImageRow], transform: ImageTransform) -> Iterator[ImageBatch]:
    """The images in batches. MissingInput when one cannot be read."""
    for batch in image_batches(run, rows, transform, BATCH_IMAGES):
        for row, error in batch.failed:
            raise MissingInput(
                f"canary image {row.image_id} of shard {row.shard} cannot be read ({error}): run `bootstrap repair`, "
                "then `bootstrap ingest`"
            )
        yield batch
