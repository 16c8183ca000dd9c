"""The model before the first step of a training: a copy of the parent, or a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip_core import (
    LoadedModel,
    MEDConfig,
    MEDTokenizer,
    build_model,
    init_from_bert,
    load_timm_weights,
)
from flows import models
from flows.errors import SettingsError
from flows.session import Run
from flows.steps.plan import TrainPlan
from storage import Lake, connect

TEXTS_AT_ONCE = 65_536


def start_of(run: Run, plan: TrainPlan) -> LoadedModel:
    """The model before its first step: the parent, or a new one."""
    settings = run.settings.model
    if plan.parent is not None:
        loaded = models.load_copy(
            run,
            plan.parent,
            image_size_px=settings.finetune_image_size_px,
            dropout=settings.dropout,
        )
        depth = loaded.model.config.text.depth
        if settings.text_depth not in (None, depth):
            raise SettingsError(
                f"model.text_depth is {settings.text_depth}, but the model to finetune has {depth} "
                "layers: leave it out"
            )
        return loaded
    if plan.tokenizer_of is not None:
        tokenizer = models.load(run, plan.tokenizer_of).tokenizer
    elif settings.tokenizer == "train":
        tokenizer = MEDTokenizer.train(
            _texts(run.lake, plan.train_sql(run.settings.seed)), settings.vocab_size
        )
    else:
        tokenizer = MEDTokenizer.from_pretrained(settings.tokenizer)
    model = build_model(model_config(run, tokenizer.vocab_size), seed=run.settings.seed)
    if settings.init_vision:
        load_timm_weights(model.vision, Path(settings.init_vision))
    if settings.init_text:
        init_from_bert(model.text, Path(settings.init_text), lm_head=model.lm_head)
    return LoadedModel(model=model.to(run.device), tokenizer=tokenizer, model_id="")


def model_config(run: Run, vocab_size: int) -> MEDConfig:
    """The preset, with what the settings change of it."""
    settings = run.settings.model
    config = MEDConfig.preset(
        settings.preset, vocab_size=vocab_size, image_size_px=settings.image_size_px
    )
    changes: dict[str, Any] = {"depth": settings.text_depth, "dropout": settings.dropout}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **given))


def _texts(lake: Lake, sql: str) -> Iterator[str]:
    """The distinct texts of a training set, sorted: what a vocabulary is learned from."""
    with connect(lake) as connection:
        query = (
            f"SELECT DISTINCT caption FROM (\n{sql}\n) WHERE caption IS NOT NULL ORDER BY caption"
        )
        found = connection.execute(query)
        while rows := found.fetchmany(TEXTS_AT_ONCE):
            yield from (row[0] for row in rows)
