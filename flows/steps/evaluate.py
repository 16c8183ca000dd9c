"""Evaluation on the held-out human pairs: retrieval, matching and caption metrics (paper, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from blip_core import (
    CaptionConfig,
    LoadedModel,
    MEDCaptioner,
    Metric,
    caption_metrics,
    encode_pairs,
    evaluate_itm,
    evaluate_retrieval,
)
from flows import models
from flows.errors import MissingInput
from flows.session import Run
from flows.settings import EVALUATE_NOT_IN_FINGERPRINTS
from flows.steps.batches import image_batches, rows_table
from flows.stream import ImageRow
from storage import (
    Clock,
    CorruptShard,
    ModelRef,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    connect,
    fingerprint,
)

STAGE_VERSION = 2
DATASET = "heldout"
PROTOCOL_OF = {"med": "zero-shot", "captioner": "finetuned", "filter": "finetuned"}
"""By the role of a model: only a captioner and a filter were finetuned for what is measured."""

HELDOUT_SQL = """
    SELECT p.image_id, any_value(p.shard), any_value(p."offset"), any_value(p.size),
           list(DISTINCT c.caption ORDER BY c.caption)
    FROM pairs p JOIN captions c USING (image_id)
    WHERE p.pool = 'heldout' AND p.status = 'ok' AND c.source = 'human' AND c.status = 'ok'
    GROUP BY p.image_id ORDER BY p.image_id
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out images with their human captions, in order of image_id."""

    images: tuple[ImageRow, ...]
    captions: tuple[tuple[str, ...], ...]


def evaluate_model(run: Run, ref: ModelRef) -> PartRef:
    """Measure one model for this round, or find it measured; one part of `metrics` each.

    A filter is measured by retrieval and matching, a captioner by its captions, a whole model by all. A
    champion is measured again in every round: figures that are compared were made alike.

    Raises:
        MissingInput: the lake has no held-out pairs.
    """
    settings = run.settings.evaluate
    config = settings.model_dump(mode="json", exclude=set(EVALUATE_NOT_IN_FINGERPRINTS)) | {
        "seed": run.settings.seed,
        "max_text_tokens": run.settings.score.max_text_tokens,
        "prompt": run.settings.caption.prompt,
        "pixel_stats": run.settings.model.pixel_stats,
    }
    heldout = held_out(run)
    if ref.role != "med":
        config["role"] = ref.role
    basis = basis_of("evaluate", STAGE_VERSION, config, _heldout_inputs(heldout), ref.model_id)
    name = part_name(ref)
    existing = committed_part(
        run.lake, "metrics", name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if existing is not None:
        return existing
    clock = Clock()
    loaded = models.load(run, ref)
    metrics = [] if ref.role == "captioner" else _matching(run, loaded, heldout)
    if ref.role != "filter":
        metrics += _captioning(run, loaded, heldout)
    records = [
        {
            "round": run.round,
            "model_id": ref.model_id,
            "dataset": DATASET,
            "metric": metric.name,
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "n": metric.n,
            "protocol": PROTOCOL_OF[ref.role],
        }
        for metric in metrics
    ]
    table = rows_table("metrics", records)
    return commit_part(run.lake, "metrics", name, table, round=run.round, basis=basis, clock=clock)


def part_name(ref: ModelRef) -> str:
    """The part of `metrics` with a model's held-out figures in a round."""
    role = "" if ref.role == "med" else f"-{ref.role}"
    return f"{DATASET}{role}-{ref.model_id[:16]}"


def held_out(run: Run) -> HeldOut:
    """The held-out pairs of the lake. Raises MissingInput when there are none."""
    with connect(run.lake) as connection:
        rows = connection.execute(HELDOUT_SQL).fetchall()
    rows = rows[: run.settings.evaluate.max_images]
    if not rows:
        raise MissingInput(
            f"lake {run.lake.uri} has no held-out pairs to evaluate on; give `ingest.heldout` a "
            "captions file with its images and run `bootstrap ingest`"
        )
    images = tuple(
        ImageRow(image_id=image_id, shard=shard, offset=offset, size=size)
        for image_id, shard, offset, size, _ in rows
    )
    return HeldOut(images=images, captions=tuple(tuple(row[4]) for row in rows))


def pixel_batches(run: Run, loaded: LoadedModel, heldout: HeldOut) -> Iterator[torch.Tensor]:
    """The held-out images as (B, 3, S, S). Raises CorruptShard when one cannot be decoded."""
    transform = models.eval_transform(run, loaded)
    for batch in image_batches(run, heldout.images, transform, run.settings.evaluate.batch_size):
        for row, error in batch.failed:
            raise CorruptShard(
                f"held-out image {row.image_id} of shard {row.shard} cannot be decoded ({error}); "
                "replace the image in its folder and run `bootstrap ingest` again"
            )
        if batch.pixel_values is not None:
            yield batch.pixel_values


def _heldout_inputs(heldout: HeldOut) -> list[str]:
    """What the figures depend on: images and captions, by content."""
    content = {
        row.image_id: list(texts)
        for row, texts in zip(heldout.images, heldout.captions, strict=True)
    }
    return [fingerprint("heldout", 1, content, [])]


def _matching(run: Run, loaded: LoadedModel, heldout: HeldOut) -> list[Metric]:
    encoded = encode_pairs(
        loaded.model,
        loaded.tokenizer,
        pixel_batches(run, loaded, heldout),
        heldout.captions,
        device=run.device,
        max_text_tokens=run.settings.score.max_text_tokens,
        spill_folder=run.lake.scratch("evaluate"),
    )
    return [
        *evaluate_retrieval(
            loaded.model, loaded.tokenizer, encoded, rerank_k=run.settings.evaluate.rerank_k
        ),
        *evaluate_itm(loaded.model, loaded.tokenizer, encoded, seed=run.settings.seed),
    ]


def _captioning(run: Run, loaded: LoadedModel, heldout: HeldOut) -> list[Metric]:
    settings = run.settings.evaluate
    config = CaptionConfig(
        decoding=settings.decoding,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        prompt=run.settings.caption.prompt,
        seed=run.settings.seed,
    )
    texts = heldout_captions(run, loaded, heldout, config)
    ids = [row.image_id for row in heldout.images]
    references = dict(zip(ids, heldout.captions, strict=True))
    return caption_metrics(dict(zip(ids, texts, strict=True)), references)


def heldout_captions(
    run: Run, loaded: LoadedModel, heldout: HeldOut, config: CaptionConfig
) -> list[str]:
    """One caption for each held-out image, in order."""
    writer = MEDCaptioner(loaded.model, loaded.tokenizer, config, device=run.device)
    texts: list[str] = []
    for pixels in pixel_batches(run, loaded, heldout):
        ids = [row.image_id for row in heldout.images[len(texts) : len(texts) + len(pixels)]]
        texts += [captions[0].text for captions in writer.caption(pixels, ids)]
    return texts
