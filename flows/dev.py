"""Pairs that a training does not see, on which it is evaluated while it runs.

Which they are depends on the seed and the image alone, so the captioner, the filter and, where it holds
pairs back too, pretraining are all judged on images that none of them has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from blip_core import (
    MED,
    Batch,
    DecodeError,
    EvalTransform,
    MEDTokenizer,
    TrainConfig,
    decode_image,
)
from blip_core.dev_losses import dev_losses
from flows.errors import SettingsError
from flows.features import FrozenFeatures
from flows.session import Run
from flows.steps.plan import TrainPlan
from storage import TrainSet, TrainSetRef, build_trainset, read_image
from storage.errors import EmptyTrainSet

logger = logging.getLogger(__name__)

MAX_BATCH = 64
"""Pairs compared with one another: as many for any number of ranks, or evaluations would differ by it."""


def build_sets(run: Run, plan: TrainPlan) -> tuple[TrainSetRef, TrainSetRef | None]:
    """Write the plan's rows to train on, and those held back to evaluate on, if any are asked for.

    Raises:
        SettingsError: `dev_share` is so small that it holds nothing back.
        EmptyTrainSet: there is nothing to train on.
    """
    seed, share = run.settings.seed, plan.settings.dev_share
    rows = build_trainset(run.lake, plan.train_sql(seed), name=plan.name)
    if not share:
        return rows, None
    try:
        dev = build_trainset(run.lake, plan.dev_sql(seed), name=f"{plan.name}-dev")
    except EmptyTrainSet as err:
        raise SettingsError(
            f"{plan.name}.dev_share {share} holds back no human image: raise it, or set it to 0"
        ) from err
    logger.info("%s: %d pairs are held back, %d trained on", plan.name, dev.num_rows, rows.num_rows)
    return rows, dev


class DevSet:
    """Batches of the pairs held back, the same in every evaluation; nothing is augmented."""

    def __init__(
        self,
        run: Run,
        rows: TrainSet,
        transform: EvalTransform,
        *,
        batch_size: int,
        features: FrozenFeatures | None = None,
    ) -> None:
        self._run, self._rows, self._transform, self._features = run, rows, transform, features
        self._batch_size = min(batch_size, MAX_BATCH)
        # texts of one image lie side by side in the set; in a batch they would be few images
        self._order = np.random.default_rng((run.settings.seed, 2)).permutation(len(rows))

    def batches(self) -> Iterator[Batch]:
        """All pairs once; one whose image cannot be decoded is left out, with a warning."""
        with ThreadPoolExecutor(self._run.settings.machine.decode_workers) as pool:
            for start in range(0, len(self._order), self._batch_size):
                numbers = self._order[start : start + self._batch_size]
                samples = [each for each in pool.map(self._sample, numbers) if each is not None]
                if samples:
                    inputs, captions, image_ids = zip(*samples, strict=True)
                    name = "pixel_values" if self._features is None else "image_embeds"
                    images = {name: torch.stack(inputs)}
                    yield Batch(captions=list(captions), image_ids=list(image_ids), **images)

    def losses(self, model: MED, tokenizer: MEDTokenizer, config: TrainConfig) -> dict[str, float]:
        """Losses of a model in evaluation mode on all pairs: see `blip_core.dev_losses`."""
        is_frozen = "vision" in config.freeze
        return dev_losses(model, tokenizer, self.batches(), config, vision_frozen=is_frozen)

    def _sample(self, number: int) -> tuple[torch.Tensor, str, str] | None:
        row = self._rows.row(int(number))
        try:
            if self._features is not None:
                image = self._features.of_row(int(number))
            else:
                data = read_image(self._run.lake, row.shard, row.offset, row.size)
                image = self._transform(decode_image(data))
        except DecodeError as err:
            logger.warning("image %s of shard %s left out: %s", row.image_id, row.shard, err)
            return None
        return image, row.caption, row.image_id
