"""Finetuning a model of your own on captioned pictures, without a lake and without rounds.

It is the cycle's own training: the pictures are packed into a lake below the result, which is
removed when the model is there. The same call after a kill goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from blip_core import LoadedModel, load_model, save_model
from blip_core.hf import require_layout
from blip_core.med import Layout
from flows.errors import SettingsError
from flows.foreign_models import load_blip
from flows.model_export import LAYOUTS, require_free, write_folder
from flows.session import Run
from flows.settings import BootstrapSettings
from flows.steps.plan import Objective, TrainPlan
from flows.steps.plans import HUMAN_SQL
from flows.steps.train import train_model
from storage import CaptionSetConfig, Lake, ModelRef, ingest_captions, local_folder, registry
from storage.layout import LAKE

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, tuple[Objective, ...]] = {"captioner": ("lm",), "filter": ("itc", "itm")}
WORK = "_tmp-finetune"
"""Folder below the result that holds what is unfinished: a lake of its own."""


def finetune(
    model: str,
    captions: Path,
    images: Path,
    out: Path,
    settings: BootstrapSettings,
    *,
    role: Literal["captioner", "filter"] = "captioner",
    layout: Layout | None = None,
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Finetune on a captions file and its pictures, with the settings' section of `role`.

    `model` is anything that `MED.from_pretrained` reads. `out` gets the finetuned one. Where a kill left
    both the whole model and the work folder, only the folder is removed.

    Raises:
        SettingsError: `out` holds a model already, or a work folder that is not ours, or no tokenizer is
            known.
        ConfigError: the model lacks a head that is trained, or the layout cannot hold it.
    """
    work = out / WORK
    _require_ours(work)
    if (out / "config.json").exists() and work.exists():
        logger.warning("%s was finished before; only %s is removed", out, work)
        _remove(work)
        return
    require_free(out)
    layout = layout or LAYOUTS[role]
    start = load_blip(model, settings)
    for objective in OBJECTIVES[role]:
        start.model.require_head(objective, f"finetuning a {role}")
    require_layout(start.model, layout)
    lake = Lake.open(str(work), create=True)
    machine = {"lake": str(work), "scratch": None, "on_stale": "rebuild"}
    run = Run(lake, settings.with_changes({"machine": machine}), 1)
    with lake.lock("finetune"):
        config = CaptionSetConfig(
            captions=str(captions), images=str(images), pool="human", name="finetune"
        )
        ingest_captions(lake, config, on_stale=run.on_stale)
        ref, _ = train_model(run, _plan(run, role, _registered(lake, start, model)), on_progress)
        finetuned = load_model(local_folder(lake, ref))
    write_folder(finetuned, out, layout, settings.model.pixel_stats)
    _remove(work)


def _require_ours(work: Path) -> None:
    """Raise SettingsError unless the work folder is absent, empty or a lake."""
    is_ours = not work.exists() or (
        work.is_dir() and ((work / LAKE).is_file() or not any(work.iterdir()))
    )
    if not is_ours:
        raise SettingsError(
            f"{work} is not a folder of a finetuning that was stopped (it has no {LAKE}): "
            "rename it, or name another folder for the model"
        )


def _remove(work: Path) -> None:
    """Remove a work folder, its mark last, so that one half removed is still known as ours."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LAKE:
            path.unlink()
    shutil.rmtree(work)


def _registered(lake: Lake, start: LoadedModel, name: str) -> ModelRef:
    """The start as the work lake's model of round 0, which a plan can have as its parent."""
    folder = lake.scratch("start")
    save_model(start.model, start.tokenizer, folder)
    return registry.register(
        lake, folder, role="med", round=0, parent_id=None, trained_on=None, config={"from": name}
    )


def _plan(run: Run, role: Literal["captioner", "filter"], start: ModelRef) -> TrainPlan:
    section = run.settings.captioner if role == "captioner" else run.settings.filter
    return TrainPlan(
        name=role,
        role=role,
        round=run.round,
        sql=section.sql or HUMAN_SQL,
        objectives=OBJECTIVES[role],
        parent=start,
        tokenizer_of=start,
        settings=section,
    )
