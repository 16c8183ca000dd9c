"""Arms measured: the held-out figures of a round's model, and each on resamples of the images, to compare arms by."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip_core import LoadedModel, Metric
from blip_core.intervals import mean_metric
from flows import models
from flows.quickstart.truth import METRIC, truth_basis, truths
from flows.session import Run
from flows.settings import EVALUATE_NOT_IN_FINGERPRINTS
from flows.steps import evaluate
from flows.steps.batches import rows_table
from flows.steps.heldout import HeldOut, held_out
from flows.steps.ingest import drawn_world
from storage import (
    Clock,
    ModelRef,
    PartRef,
    basis_of,
    commit_part,
    committed_part,
    drop_part,
    list_parts,
)
from storage.fingerprint import Basis

STAGE_VERSION = 1
DATASET = "arms"
"""Of `metrics`: apart from `heldout`, whose figures decide on a round's model."""


def measure_arm(run: Run, ref: ModelRef) -> PartRef:
    """Measure an arm's model by the settings of the run, or find it measured; its part of `metrics`.

    All arms are measured with one seed, whichever they were trained with.

    Raises:
        MissingInput: the lake has no held-out pairs.
    """
    heldout = held_out(run)
    basis = _basis(run, ref, heldout)
    existing = _committed(run, "metrics", ref, basis)
    if existing is not None and _committed(run, "arm_resamples", ref, basis) is not None:
        return existing
    clock = Clock()
    metrics = _figures(run, models.load(run, ref), heldout)
    about = {"round": run.round, "model_id": ref.model_id}
    resamples = [
        about | {"metric": metric.name, "resample": number, "value": value}
        for metric in metrics
        if metric.resamples is not None
        for number, value in enumerate(metric.resamples.tolist())
    ]
    figures = [
        about
        | {
            "dataset": DATASET,
            "metric": metric.name,
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "n": metric.n,
            "protocol": evaluate.PROTOCOL_OF[ref.role],
        }
        for metric in metrics
    ]
    # Figures last: they say that the arm is measured.
    for table, rows in (("arm_resamples", resamples), ("metrics", figures)):
        part = commit_part(
            run.lake,
            table,
            _part_name(ref),
            rows_table(table, rows),
            round=run.round,
            basis=basis,
            clock=clock,
        )
    return part


def is_measured(run: Run, ref: ModelRef) -> bool:
    """Whether all figures of an arm's model are there, made by the settings of the run."""
    basis = _basis(run, ref, held_out(run))
    tables = ("metrics", "arm_resamples")
    return all(_committed(run, table, ref, basis) is not None for table in tables)


def drop_measured(run: Run, ref: ModelRef) -> None:
    """Drop the figures of an arm's model."""
    for table in ("metrics", "arm_resamples"):
        for part in list_parts(run.lake, table, run.round):
            if part.name == _part_name(ref):
                drop_part(run.lake, part)


def measuring_basis(run: Run) -> dict[str, Any]:
    """What of the settings the figures of every arm depend on."""
    settings = run.settings
    config = settings.evaluate.model_dump(mode="json", exclude=set(EVALUATE_NOT_IN_FINGERPRINTS))
    config |= {
        "seed": settings.seed,
        "max_text_tokens": settings.score.max_text_tokens,
        "prompt": settings.caption.prompt,
        "pixel_stats": settings.model.pixel_stats,
    }
    return config | ({"truth": truth_basis(run)} if settings.world is not None else {})


def _basis(run: Run, ref: ModelRef, heldout: HeldOut) -> Basis:
    inputs = evaluate.heldout_inputs(heldout)
    return basis_of("measure-arm", STAGE_VERSION, measuring_basis(run), inputs, ref.model_id)


def _figures(run: Run, loaded: LoadedModel, heldout: HeldOut) -> list[Metric]:
    _, metrics = evaluate.matching(run, loaded, heldout)
    metrics += evaluate.captioning(run, loaded, heldout)
    if run.settings.world is not None:
        hits = truths(run, loaded, heldout, drawn_world(run.settings))
        metrics.append(mean_metric(METRIC, np.array(hits, dtype=np.float64)))
    return metrics


def _committed(run: Run, table: str, ref: ModelRef, basis: Basis) -> PartRef | None:
    name = _part_name(ref)
    return committed_part(
        run.lake, table, name, round=run.round, basis=basis, on_stale=run.on_stale
    )


def _part_name(ref: ModelRef) -> str:
    return f"{DATASET}-{ref.model_id[:16]}"
