"""What one training is: its rows, its objectives, where it starts, and its settings as the core reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip_core import TrainConfig
from blip_core.dev_losses import DEV_LOSS
from blip_core.sharding import Sharding
from flows.errors import SettingsError
from flows.train_section import TrainSettings
from storage import ModelRef

OF_THE_FEED = (
    "sql",
    "captions_per_epoch",
    "source_weights",
    "augment",
    "min_crop_area",
    "swap_sides",
    "cache_vision",
    "dev_share",
)
"""Settings that say what batches hold; the engine does not know them."""

Objective = Literal["itc", "itm", "lm"]
ALL_OBJECTIVES: tuple[Objective, ...] = ("itc", "itm", "lm")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """What is trained, on which rows, from where."""

    name: str
    """pretrain, captioner, filter, retrain or that of an arm."""
    role: str
    """Role in the registry: med, captioner, filter or arm."""
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

    def train_sql(self, seed: int) -> str:
        """The rows to train on: all but those of images held back."""
        if not self.settings.dev_share:
            return self.sql
        return f"{self._held_back(seed)} SELECT * FROM pair ANTI JOIN held USING (image_id)"

    def dev_sql(self, seed: int) -> str:
        """The human rows of images held back, to evaluate on."""
        return (
            f"{self._held_back(seed)} SELECT * FROM pair SEMI JOIN held USING (image_id) "
            "WHERE source = 'human'"
        )

    def _held_back(self, seed: int) -> str:
        """Images are drawn by a hash of seed and image_id: others that come or go change nothing."""
        below = min(int(self.settings.dev_share * 2**128), 2**128 - 1)
        return (
            f"WITH pair AS (SELECT image_id, caption, source FROM (\n{self.sql}\n)), held AS ("
            "SELECT DISTINCT image_id FROM pair WHERE source = 'human' "
            f"AND md5(concat('dev {seed} ', image_id)) < '{below:032x}')"
        )


def train_config(
    plan: TrainPlan, seed: int, rows_per_epoch: int, *, sharding: Sharding = "none"
) -> TrainConfig:
    """The core's configuration of a plan whose epochs have `rows_per_epoch` rows."""
    settings = plan.settings
    fields = settings.model_dump(exclude=set(OF_THE_FEED))
    if settings.schedule == "epoch_decay" and settings.steps_per_epoch is None:
        rows_a_step = settings.batch_size * settings.accumulate_steps
        fields["steps_per_epoch"] = max(1, round(rows_per_epoch / rows_a_step))
    if settings.dev_share:
        known = [DEV_LOSS, *(f"{DEV_LOSS}_{objective}" for objective in plan.objectives)]
        if settings.best_metric not in known:
            raise SettingsError(
                f"{plan.name}.best_metric is {settings.best_metric}, but this training has {', '.join(known)}"
            )
    else:
        fields["best_metric"] = None
    return TrainConfig(objectives=plan.objectives, seed=seed, sharding=sharding, **fields)
