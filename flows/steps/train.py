"""Training: one step for pretraining, both finetunings and the retraining."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from blip_core import (
    MED,
    EvalTransform,
    TrainConfig,
    TrainLog,
    TrainResult,
    TrainTransform,
    save_model,
)
from blip_core import train as run_training
from blip_core.distributed import current_world
from flows import models
from flows.boards import Boards
from flows.book import note_speed
from flows.dev import DevSet, build_sets
from flows.features import FrozenFeatures, frozen_features
from flows.feed import TrainFeed
from flows.order import EpochOrder
from flows.session import Run
from flows.settings import model_basis, train_basis
from flows.skipped import SkippedRows
from flows.steps.batches import rows_table
from flows.steps.curve import curve_rows, warn_if_stuck
from flows.steps.plan import TrainPlan, train_config
from flows.steps.ranks import train_in_ranks
from flows.steps.start import start_of
from storage import (
    Clock,
    Lake,
    ModelRef,
    PartRef,
    TrainSet,
    TrainSetRef,
    basis_of,
    carried_model,
    commit_part,
    committed_part,
    fingerprint_of,
    open_trainset,
    read_part,
    registry,
)

logger = logging.getLogger(__name__)

STAGE_VERSION = 2
FINAL = "final"
FEATURES = "features"
DEV_FEATURES = "dev-features"
SKIPPED = "skipped.txt"
ROWS_SKIPPED = "rows_skipped"
"""Metric of a finished training: rows passed over because their image could not be decoded."""
BEST_STEP = "best_step"
"""Metric of a finished training that held pairs back: the step whose weights the model has."""


def train_model(
    run: Run, plan: TrainPlan, on_progress: Callable[[int, int, str], None]
) -> tuple[ModelRef, bool]:
    """Train the model of a plan, or find it made from the same things; says whether it was built.

    Checkpoints lie in the run's scratch folder; the same call after a kill goes on from the last.
    The training curve is committed last and is the record that the model is finished.

    Raises:
        EmptyTrainSet: the plan's query gives no rows.
        StaleOutput: this round's model was made from something else; names what differs.
        SettingsError: `source_weights` or `dev_share` do not fit the rows.
    """
    rows, dev = build_sets(run, plan)
    basis = _basis(run, plan, rows, dev)
    name = f"train-{plan.name}"
    curve = committed_part(
        run.lake, "metrics", name, round=plan.round, basis=basis, on_stale=run.on_stale
    )
    if curve is not None and (made := _model_of(run.lake, curve)) is not None:
        return made, False
    carried = carried_model(run.lake, name, plan.role, round=plan.round, basis=basis)
    if carried is not None:
        return carried, False
    # refuse what does not fit before any compute
    train_config(plan, run.settings.seed, len(_order(run, plan, open_trainset(run.lake, rows))))
    clock = Clock()
    folder = run.lake.scratch("train", f"{plan.name}-{fingerprint_of(basis)[:16]}")
    if run.settings.machine.train_processes > 1:
        if plan.settings.cache_vision:  # here: ranks that wait for one another do not wait for long
            model = start_of(run, plan).model
            _features(run, plan, rows, model, folder / FEATURES, on_progress)
            if dev is not None:
                _features(run, plan, dev, model, folder / DEV_FEATURES, on_progress)
        history = _fit_in_ranks(run, plan, rows, dev, folder, on_progress)
    else:
        history = fit(run, plan, rows, folder, on_progress, dev=dev)
    ref = registry.register(
        run.lake,
        folder / FINAL,
        role=plan.role,
        round=plan.round,
        parent_id=plan.parent.model_id if plan.parent else None,
        trained_on=rows.fingerprint,
        config=basis["config"],
    )
    if plan.role != registry.ARM:  # the round did not spend its time on it
        note_speed(run, plan.name, history)
    table = rows_table("metrics", curve_rows(plan, ref, history))
    commit_part(run.lake, "metrics", name, table, round=plan.round, basis=basis, clock=clock)
    shutil.rmtree(folder)
    return ref, True


def _model_of(lake: Lake, curve: PartRef) -> ModelRef | None:
    """The model that a training curve belongs to; None when `repair` has dropped it."""
    model_id = read_part(lake, curve, ["model_id"]).column(0)[0].as_py()
    known = (ref for ref in registry.list_models(lake) if ref.model_id == model_id)
    return next(known, None)


def _fit_in_ranks(
    run: Run,
    plan: TrainPlan,
    rows: TrainSetRef,
    dev: TrainSetRef | None,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    """Call `fit` in several processes; returns the history."""
    machine = run.settings.machine
    scratch = run.lake.scratch_root
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    refs = {
        name: dataclasses.asdict(ref) if (ref := values[name]) is not None else None
        for name in ("parent", "tokenizer_of")
    }
    job = {
        "settings": run.settings.model_dump(mode="json"),
        "round": run.round,
        "scratch": str(scratch) if scratch else None,
        "plan": values | refs | {"settings": plan.settings.model_dump(mode="json")},
        "rows": dataclasses.asdict(rows),
        "dev": dataclasses.asdict(dev) if dev is not None else None,
    }
    return train_in_ranks(
        job,
        folder,
        processes=machine.train_processes,
        num_threads=machine.num_threads,
        on_progress=on_progress,
    )


def fit(
    run: Run,
    plan: TrainPlan,
    rows: TrainSetRef,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
    *,
    dev: TrainSetRef | None = None,
) -> list[dict[str, Any]]:
    """Train and save to `folder/final`; returns the history, and last a line of `rows_skipped`.

    With `dev`, the model is evaluated on it, and what is saved is the best one; the last line has its
    `best_step`. Ranks of a process group train together.
    """
    world = current_world()
    loaded = start_of(run, plan)
    feed = _feed(run, plan, rows, loaded.model, folder, on_progress)
    sharding = run.settings.machine.train_sharding
    config = train_config(plan, run.settings.seed, feed.rows_per_epoch, sharding=sharding)
    held_back = None
    if dev is not None:
        held_back = _dev_set(run, plan, dev, loaded.model, folder, on_progress)
    curves = run.lake.scratch("tensorboard", f"{plan.name}-round-{plan.round}")
    shown = train_basis(plan.settings)
    with Boards(curves, folder.name, shown) if world.is_first else nullcontext() as boards:

        def on_log(log: TrainLog) -> None:
            _draw(boards, dataclasses.asdict(log), log.step)
            on_progress(log.step, config.steps, f"loss {log.loss:.3f}")

        def evaluate(model: MED, step: int) -> dict[str, float]:
            assert held_back is not None
            losses = held_back.losses(model, loaded.tokenizer, config)
            _draw(boards, losses, step)
            return losses

        try:
            result = run_training(
                loaded.model,
                loaded.tokenizer,
                feed,
                config,
                folder / "steps",
                device=run.device,
                on_log=on_log,
                evaluate=evaluate if held_back is not None else None,
            )
        finally:
            feed.close()
    if not world.is_first:
        return result.history
    last = _last_line(plan, config, result, SkippedRows(folder / SKIPPED))
    save_model(loaded.model, loaded.tokenizer, folder / FINAL)
    return [*result.history, last]


def _draw(boards: Boards | None, values: Mapping[str, float | None], step: int) -> None:
    if boards is not None:
        boards.log({name: value for name, value in values.items() if name != "step"}, step)


def _last_line(
    plan: TrainPlan, config: TrainConfig, result: TrainResult, skipped: SkippedRows
) -> dict[str, Any]:
    """What is known when a training has ended; says in the log what somebody should know of it."""
    num_skipped = skipped.count(result.steps * config.accumulate_steps * config.batch_size)
    last: dict[str, Any] = {"step": result.steps, ROWS_SKIPPED: num_skipped}
    if num_skipped:
        logger.warning("%s: %d undecodable rows were passed over", plan.name, num_skipped)
    if result.best_step is not None:
        last[BEST_STEP] = result.best_step
        logger.info(
            "%s: the model is that of step %d of %d, whose %s was %.4f",
            plan.name,
            result.best_step,
            result.steps,
            config.best_metric,
            result.best_value,
        )
    warn_if_stuck(plan.name, result.history)
    return last


def _feed(
    run: Run,
    plan: TrainPlan,
    rows: TrainSetRef,
    model: MED,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> TrainFeed:
    """Batches of the plan's rows: pixels, or the image tokens of a frozen vision encoder."""
    settings, world = plan.settings, current_world()
    opened = open_trainset(run.lake, rows)
    mean, std = models.pixel_stats(run)
    size = model.config.vision.image_size_px
    return TrainFeed(
        run.lake,
        opened,
        TrainTransform(
            size,
            augment=settings.augment,
            mean=mean,
            std=std,
            min_crop_area=settings.min_crop_area,
            swap_sides=settings.swap_sides,
        ),
        batch_size=settings.batch_size,
        seed=run.settings.seed,
        workers=run.settings.machine.decode_workers,
        world=world,
        features=_features(run, plan, rows, model, folder / FEATURES, on_progress),
        order=_order(run, plan, opened),
        skipped=SkippedRows(folder / SKIPPED),
    )


def _dev_set(
    run: Run,
    plan: TrainPlan,
    rows: TrainSetRef,
    model: MED,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> DevSet:
    """The pairs held back, to evaluate on."""
    return DevSet(
        run,
        open_trainset(run.lake, rows),
        _eval_transform(run, model),
        batch_size=plan.settings.batch_size,
        features=_features(run, plan, rows, model, folder / DEV_FEATURES, on_progress),
    )


def _eval_transform(run: Run, model: MED) -> EvalTransform:
    mean, std = models.pixel_stats(run)
    return EvalTransform(model.config.vision.image_size_px, mean=mean, std=std)


def _features(
    run: Run,
    plan: TrainPlan,
    rows: TrainSetRef,
    model: MED,
    folder: Path,
    on_progress: Callable[[int, int, str], None],
) -> FrozenFeatures | None:
    """What frozen vision makes of the images of `rows`, made or found in `folder`; None when it is not kept."""
    if not plan.settings.cache_vision:
        return None
    return frozen_features(
        run,
        open_trainset(run.lake, rows),
        model,
        _eval_transform(run, model),
        folder,
        dtype=plan.settings.dtype,
        on_progress=lambda done, total: on_progress(done, total, "encoding images"),
    )


def _order(run: Run, plan: TrainPlan, rows: TrainSet) -> EpochOrder:
    """The order of the plan's rows; SettingsError when `source_weights` do not fit them."""
    settings = plan.settings
    return EpochOrder(
        rows,
        seed=run.settings.seed,
        captions_per_epoch=settings.captions_per_epoch,
        source_weights=settings.source_weights,
        scratch=run.lake.scratch("order"),
    )


def _basis(
    run: Run, plan: TrainPlan, rows: TrainSetRef, dev: TrainSetRef | None = None
) -> dict[str, Any]:
    """Everything that the weights depend on."""
    config = {
        "train": train_basis(plan.settings),
        "model": model_basis(run.settings.model),
        "objectives": list(plan.objectives),
        "seed": run.settings.seed,
        "tokenizer_of": plan.tokenizer_of.model_id if plan.tokenizer_of else None,
    }
    ranks = run.settings.machine.train_processes
    if ranks > 1 and "itm" in plan.objectives and plan.settings.negatives_from == "rank":
        config["ranks"] = ranks  # each draws its negatives from its own part of a batch
    if dev is not None:
        config["dev_set"] = dev.fingerprint  # decides which step's weights are kept
    parent = plan.parent.model_id if plan.parent else ""
    return basis_of(f"train-{plan.name}", STAGE_VERSION, config, [rows.fingerprint], parent)
