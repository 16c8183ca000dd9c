"""One forward pass of a training step, as the engine runs it: precision, compilation, memory, several ranks.

Dimension key: B batch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from blip_core.config import require
from blip_core.distributed import World
from blip_core.losses import IGNORED, lm_labels
from blip_core.med import MED
from blip_core.momentum import MomentumEncoders
from blip_core.objectives import OBJECTIVES, Losses, Ranks, StepInputs, compute_losses
from blip_core.sharding import shard
from blip_core.split_tensors import own_part
from blip_core.train_config import TrainConfig


class Forward:
    """Computes the losses of a batch; with several ranks, its backward averages their gradients.

    With `sharding` "full" it splits the model and its twins over the ranks when it is made, so an optimizer
    comes after it; otherwise ranks are joined by `join`, once the weights are those to begin with.
    """

    def __init__(
        self,
        model: MED,
        momentum: MomentumEncoders | None,
        config: TrainConfig,
        world: World,
        device: torch.device,
        *,
        vision_frozen: bool,
    ) -> None:
        self.world, self.config, self.device = world, config, device
        self._call: nn.Module = _Step(model, momentum, config, world, vision_frozen)
        self.is_sharded = is_sharded(config, world)
        if self.is_sharded:
            shard(self._call, model, momentum, device)

    def join(self, config: TrainConfig) -> None:
        """Give all ranks the first one's weights, and exchange gradients from now on; `config` says the dtype."""
        self.config = config
        if self.world.size == 1 or self.is_sharded:
            return
        self._call = DistributedDataParallel(
            self._call,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=set(config.objectives) != set(OBJECTIVES),
        )

    def __call__(
        self,
        inputs: StepInputs,
        *,
        distill_alpha: float,
        negative_hardness: float,
        lm_weight: float,
        generator: torch.Generator | None,
    ) -> Losses:
        """Return the losses of this rank's batch; see `compute_losses`."""
        enabled = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            values = self._call(
                inputs.to(self.device), distill_alpha, negative_hardness, lm_weight, generator
            )
        return Losses(**values)

    def sync(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch: gradients are exchanged with the last one only.

        Where they are sharded, with each: a rank would have to hold all of them otherwise.
        """
        if isinstance(self._call, DistributedDataParallel) and not is_last:
            return self._call.no_sync()
        return nullcontext()

    def lm_weights(self, inputs: list[StepInputs]) -> list[float]:
        """Return each micro-batch's factor of loss_lm, so that every token of the step weighs the same."""
        total_parts = len(inputs) * self.world.size
        if total_parts == 1 or "lm" not in self.config.objectives:
            return [1.0] * len(inputs)
        counts = torch.tensor([_num_supervised(each) for each in inputs], device=self.device)
        total = max(1, int(self.world.sum(counts.sum())))
        return [count * total_parts / total for count in counts.tolist()]


class _Step(nn.Module):
    """`compute_losses` as a module, which is what DistributedDataParallel wraps."""

    def __init__(
        self,
        model: MED,
        momentum: MomentumEncoders | None,
        config: TrainConfig,
        world: World,
        vision_frozen: bool,
    ) -> None:
        super().__init__()
        self.model, self.world = model, world
        self.from_all = config.negatives_from == "all_ranks"
        self.losses = partial(
            compute_losses,
            model,
            momentum,
            objectives=config.objectives,
            label_smoothing=config.label_smoothing,
            vision_frozen=vision_frozen,
        )

    def forward(
        self,
        inputs: StepInputs,
        distill_alpha: float,
        negative_hardness: float,
        lm_weight: float,
        generator: torch.Generator | None,
    ) -> dict[str, Any]:
        """Return the fields of `Losses`: containers that DistributedDataParallel can look into."""
        ranks = Ranks(self.world, self.from_all, generator)
        losses = self.losses(
            inputs,
            distill_alpha=distill_alpha,
            negative_hardness=negative_hardness,
            lm_weight=lm_weight,
            ranks=ranks,
        )
        return {field.name: getattr(losses, field.name) for field in fields(losses)}


def _num_supervised(inputs: StepInputs) -> int:
    tokens = inputs.lm_tokens
    labels = lm_labels(tokens.input_ids, tokens.attention_mask, inputs.num_prompt_tokens)
    return int((labels[:, 1:] != IGNORED).sum())


@contextmanager
def arranged(model: MED, config: TrainConfig) -> Iterator[None]:
    """Compile and checkpoint the vision blocks as `config` says, for the length of a `with`."""
    blocks = list(model.vision.blocks)
    num_checkpointed = config.checkpoint_blocks
    require(
        num_checkpointed <= len(blocks),
        f"checkpoint_blocks is {num_checkpointed}, but the vision encoder has {len(blocks)} blocks",
    )
    try:
        for block in blocks[len(blocks) - num_checkpointed :]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for block in blocks if config.compile else ():
            block.compile()
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
            block._compiled_call_impl = None


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Return whether a model is split over the ranks; one rank has nothing to share."""
    return config.sharding == "full" and world.size > 1


def is_finite(model: nn.Module, world: World) -> bool:
    """Return whether every parameter is finite, on all ranks."""
    norms = torch._foreach_norm([own_part(each.detach()) for each in model.parameters()])
    return all_finite(world, torch.stack(list(norms)).max())


def all_finite(world: World, *values: Tensor) -> bool:
    """Return whether all `values` () of all ranks are finite."""
    broken = sum((~torch.isfinite(value)).float() for value in values)
    assert isinstance(broken, Tensor)
    return float(world.sum(broken)) == 0
