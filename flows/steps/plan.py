"""What one training is: its rows, its objectives, where it starts, and its settings as the core reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip_core import TrainConfig
from blip_core.sharding import Sharding
from flows.sections import TrainSettings
from storage import ModelRef

OF_THE_FEED = ("augment", "cache_vision", "captions_per_epoch", "source_weights")
"""Settings that say what batches hold; the engine does not know them."""

Objective = Literal["itc", "itm", "lm"]
ALL_OBJECTIVES: tuple[Objective, ...] = ("itc", "itm", "lm")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """What is trained, on which rows, from where."""

    name: str
    """pretrain, captioner, filter or retrain."""
    role: str
    """Role in the registry: med, captioner or filter."""
    round: int
    """Round that the model belongs to; 0 for pretraining."""
    sql: str
    """Rows of the training set: image_id, caption, source."""
    objectives: tuple[Objective, ...]
    parent: ModelRef | None
    """Model to finetune; None trains a new one (paper, Table 13)."""
    tokenizer_of: ModelRef | None
    """Model whose tokenizer a new model takes over; None trains or loads one."""
    settings: TrainSettings


def train_config(
    plan: TrainPlan, seed: int, rows_per_epoch: int, *, sharding: Sharding = "none"
) -> TrainConfig:
    """The core's configuration of a plan whose epochs have `rows_per_epoch` rows."""
    settings = plan.settings
    fields = settings.model_dump(exclude=set(OF_THE_FEED))
    if settings.schedule == "epoch_decay" and settings.steps_per_epoch is None:
        rows_a_step = settings.batch_size * settings.accumulate_steps
        fields["steps_per_epoch"] = max(1, round(rows_per_epoch / rows_a_step))
    return TrainConfig(objectives=plan.objectives, seed=seed, sharding=sharding, **fields)
