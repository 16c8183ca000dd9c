"""How true a model's own captions are, in a world where the truth is known."""

from __future__ import annotations

from typing import Any

from blip_core import CaptionConfig, LoadedModel
from blip_core.rates import Rate
from flows import models
from flows.quickstart.verdict import captions_true
from flows.quickstart.world import World
from flows.session import Run
from flows.settings import curate_basis, decoding_fields
from flows.steps.batches import rows_table
from flows.steps.evaluate import PROTOCOL_OF, heldout_captions
from flows.steps.heldout import DATASET, HeldOut, held_out
from storage import Clock, ModelRef, PartRef, basis_of, commit_part, committed_part

STAGE_VERSION = 2
METRIC = "caption_truth"


def measure_truth(run: Run, ref: ModelRef, world: World) -> PartRef:
    """Share of nucleus captions of the held-out pictures that are true; one part of `metrics`."""
    basis = basis_of("truth", STAGE_VERSION, truth_basis(run), [str(world.config)], ref.model_id)
    name = f"truth-{ref.model_id[:16]}"
    existing = committed_part(
        run.lake, "metrics", name, round=run.round, basis=basis, on_stale=run.on_stale
    )
    if existing is not None:
        return existing
    clock = Clock()
    heldout = held_out(run)
    hits = truths(run, models.load(run, ref), heldout, world)
    rate = Rate(hits=sum(hits), n=len(hits))
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


def truths(run: Run, loaded: LoadedModel, heldout: HeldOut, world: World) -> list[bool]:
    """Whether a model's nucleus caption of each held-out picture is true, in order."""
    decoding = decoding_fields(run.settings.caption) | {"num_captions": 1}
    config = CaptionConfig(seed=run.settings.seed, **decoding)
    texts = heldout_captions(run, loaded, heldout, config)
    ids = [row.image_id for row in heldout.images]
    return captions_true(zip(ids, texts, strict=True), world)


def truth_basis(run: Run) -> dict[str, Any]:
    """What of the settings these captions depend on."""
    settings = run.settings.caption
    return curate_basis(settings) | {"batch_size": settings.batch_size, "seed": run.settings.seed}
