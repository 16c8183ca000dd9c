"""How true a model's own captions are, in a world where the truth is known."""

from __future__ import annotations

from blip_core import CaptionConfig
from flows import models
from flows.quickstart.verdict import caption_truth
from flows.quickstart.world import World
from flows.session import Run
from flows.settings import curate_basis, decoding_fields
from flows.steps.batches import rows_table
from flows.steps.evaluate import PROTOCOL_OF, heldout_captions
from flows.steps.heldout import DATASET, held_out
from storage import Clock, ModelRef, PartRef, basis_of, commit_part, committed_part

STAGE_VERSION = 2
METRIC = "caption_truth"


def measure_truth(run: Run, ref: ModelRef, world: World) -> PartRef:
    """Share of nucleus captions of the held-out pictures that are true; one part of `metrics`."""
    settings = run.settings.caption
    decoding = decoding_fields(settings) | {"num_captions": 1}
    config = CaptionConfig(seed=run.settings.seed, **decoding)
    basis = basis_of(
        "truth",
        STAGE_VERSION,
        curate_basis(settings) | {"batch_size": settings.batch_size, "seed": run.settings.seed},
        [str(world.config)],
        ref.model_id,
    )
    name = f"truth-{ref.model_id[:16]}"
    existing = committed_part(
        run.lake, "metrics", name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if existing is not None:
        return existing
    clock = Clock()
    heldout = held_out(run)
    texts = heldout_captions(run, models.load(run, ref), heldout, config)
    ids = [row.image_id for row in heldout.images]
    rate = caption_truth(zip(ids, texts, strict=True), world)
    low, high = rate.interval()
    record = {
        "round": run.round,
        "model_id": ref.model_id,
        "dataset": DATASET,
        "metric": METRIC,
        "value": rate.value,
        "low": low,
        "high": high,
        "n": rate.n,
        "protocol": PROTOCOL_OF[ref.role],
    }
    table = rows_table("metrics", [record])
    return commit_part(run.lake, "metrics", name, table, round=run.round, basis=basis, clock=clock)
