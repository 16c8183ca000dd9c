"""Evaluation on the held-out human pairs: retrieval, matching and caption metrics (paper, section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from blip_core import (
    CaptionConfig,
    LoadedModel,
    MEDCaptioner,
    Metric,
    RetrievalRanks,
    caption_metrics,
    encode_pairs,
    evaluate_itm,
    rank_pairs,
    recall_metrics,
)
from flows import models
from flows.session import Run
from flows.settings import EVALUATE_NOT_IN_FINGERPRINTS
from flows.steps.batches import image_batches, rows_table
from flows.steps.heldout import DATASET, HeldOut, commit_ranks, committed_ranks, held_out
from storage import (
    Clock,
    CorruptShard,
    ModelRef,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    fingerprint,
)

STAGE_VERSION = 2
PROTOCOL_OF = {
    "med": "zero-shot",
    "arm": "zero-shot",
    "captioner": "finetuned",
    "filter": "finetuned",
}
"""By the role of a model: only a captioner and a filter were finetuned for what is measured."""


def evaluate_model(run: Run, ref: ModelRef) -> PartRef:
    """Measure one model for this round, or find it measured; one part of `metrics` each.

    A filter is measured by retrieval and matching, a captioner by its captions, a whole model by all. A
    champion is measured again in every round: figures that are compared were made alike. The ranks that the
    recalls of a whole model are made of are kept too, so that the gate can compare image by image.

    Raises:
        MissingInput: the lake has no held-out pairs.
    """
    heldout = held_out(run)
    basis = _basis(run, ref, heldout)
    name = part_name(ref)
    existing = committed_part(
        run.lake, "metrics", name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    ranked = ref.role != "med" or committed_ranks(run, ref, basis) is not None
    if existing is not None and ranked:
        return existing
    clock = Clock()
    loaded = models.load(run, ref)
    metrics: list[Metric] = []
    if ref.role != "captioner":
        ranks, metrics = matching(run, loaded, heldout)
        if not ranked:
            commit_ranks(run, ref, heldout, ranks, basis)
        if existing is not None:  # Killed between the two, or measured by a version without ranks.
            return existing
    if ref.role != "filter":
        metrics += captioning(run, loaded, heldout)
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


def _basis(run: Run, ref: ModelRef, heldout: HeldOut) -> dict[str, Any]:
    config = run.settings.evaluate.model_dump(
        mode="json", exclude=set(EVALUATE_NOT_IN_FINGERPRINTS)
    ) | {
        "seed": run.settings.seed,
        "max_text_tokens": run.settings.score.max_text_tokens,
        "prompt": run.settings.caption.prompt,
        "pixel_stats": run.settings.model.pixel_stats,
    }
    if ref.role != "med":
        config["role"] = ref.role
    return basis_of("evaluate", STAGE_VERSION, config, heldout_inputs(heldout), ref.model_id)


def part_name(ref: ModelRef) -> str:
    """The part of `metrics` with a model's held-out figures in a round."""
    role = "" if ref.role == "med" else f"-{ref.role}"
    return f"{DATASET}{role}-{ref.model_id[:16]}"


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


def heldout_inputs(heldout: HeldOut) -> list[str]:
    """What the figures depend on: images and captions, by content."""
    content = {
        row.image_id: list(texts)
        for row, texts in zip(heldout.images, heldout.captions, strict=True)
    }
    return [fingerprint("heldout", 1, content, [])]


def matching(
    run: Run, loaded: LoadedModel, heldout: HeldOut
) -> tuple[RetrievalRanks, list[Metric]]:
    """Ranks of the held-out pairs, recalls, and figures of telling true pairs from wrong ones."""
    encoded = encode_pairs(
        loaded.model,
        loaded.tokenizer,
        pixel_batches(run, loaded, heldout),
        heldout.captions,
        device=run.device,
        max_text_tokens=run.settings.score.max_text_tokens,
        spill_folder=run.lake.scratch("evaluate"),
    )
    ranks = rank_pairs(
        loaded.model, loaded.tokenizer, encoded, rerank_k=run.settings.evaluate.rerank_k
    )
    metrics = recall_metrics(ranks)
    metrics += evaluate_itm(loaded.model, loaded.tokenizer, encoded, seed=run.settings.seed)
    return ranks, metrics


def captioning(run: Run, loaded: LoadedModel, heldout: HeldOut) -> list[Metric]:
    """Caption metrics of what a model writes about the held-out images."""
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
