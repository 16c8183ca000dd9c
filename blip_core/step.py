"""One optimizer step: micro-batches forward and backward, clipping, the teacher and the queue.

Every random draw comes from (seed, step, rank), so a step done again after a kill is the same step.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip_core.distributed import World
from blip_core.errors import TrainingError
from blip_core.forward import Forward, all_finite, is_sharded
from blip_core.med import MED
from blip_core.momentum import MomentumEncoders
from blip_core.objectives import Batch, Losses, StepInputs
from blip_core.schedule import learning_rate, parameter_groups, ramp
from blip_core.split_tensors import average_whole, fill, separated, total_norm, whole_tensor
from blip_core.tokenizer import MEDTokenizer
from blip_core.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class StepDone:
    """What a finished step leaves for the history."""

    inputs: list[StepInputs]
    """The rank's part of each micro-batch."""
    losses: list[Losses]
    of_step: dict[str, float]
    """lr, grad_norm, and the scale where there is one."""


class Stepper:
    """A model with its optimizer, momentum encoders and queue.

    `model` is what is trained: the given one, or with `sharding` "full" a copy that is split over the ranks.
    """

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        config: TrainConfig,
        world: World,
        device: torch.device,
    ) -> None:
        self._given = model
        self.model = copy.deepcopy(model) if is_sharded(config, world) else model
        model = self.model
        self.config, self.world, self.device = config, world, device
        self._tokenizer = tokenizer
        self.vision_frozen = not any(p.requires_grad for p in model.vision.parameters())
        self.momentum = (
            MomentumEncoders(model, config.queue_size, config.teacher_mode)
            if "itc" in config.objectives
            else None
        )
        self._forward = Forward(
            model, self.momentum, config, world, device, vision_frozen=self.vision_frozen
        )
        groups = parameter_groups(
            model,
            config.weight_decay,
            config.weight_decay_on,
            fresh_lr_scale=config.fresh_lr_scale,
        )
        self.optimizer = torch.optim.AdamW(
            separated(groups),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            fused=True,
        )

    def train_mode(self) -> None:
        """Turn dropout on where something is trained."""
        self.model.train()
        if self.vision_frozen:
            self.model.vision.eval()

    def begin(self) -> None:
        """Join the ranks with the weights as they are now; after loading, before the first step."""
        self._forward.join(self.config)
        self.train_mode()

    def whole_model(self) -> MED:
        """Return the given model with the weights as they are now; all ranks call this."""
        given = self._given
        if given is not self.model:
            trained = dict(self.model.named_parameters())
            for name, parameter in given.named_parameters():
                fill(parameter, whole_tensor(trained[name]))
        return given

    def do(self, step: int, batches: list[Batch]) -> StepDone | None:
        """Do one optimizer step; None, and no weight of the model moved, when a loss or gradient is not finite."""
        config, model, world, forward = self.config, self.model, self.world, self._forward
        torch.manual_seed(_step_seed(config.seed, step, world.rank))
        shared = None
        if world.size > 1:  # draws that all ranks make alike
            shared = torch.Generator(self.device).manual_seed(_step_seed(config.seed, step, 0))
        rate = self._set_rate(step)
        model.clamp_scale()
        if self.momentum is not None:
            self.momentum.update(model, config.momentum)
        micro = [self._tokenise(batch) for batch in batches]
        self.optimizer.zero_grad(set_to_none=True)
        done = []
        for index, lm_weight in enumerate(forward.lm_weights(micro)):
            with forward.sync(is_last=index == len(micro) - 1):
                losses = forward(
                    micro[index],
                    distill_alpha=ramp(step, config.distill_alpha, config.alpha_ramp_steps),
                    negative_hardness=ramp(step, 1.0, config.hard_negatives_ramp_steps),
                    lm_weight=lm_weight,
                    generator=shared,
                )
                (losses.total / len(micro)).backward()  # type: ignore[no-untyped-call]
            losses.total = losses.total.detach()
            done.append(losses)
        if forward.is_sharded:
            average_whole(model.parameters(), world)
        grad_norm = self._grad_norm()
        if not all_finite(world, grad_norm, *(losses.total for losses in done)):
            self.optimizer.zero_grad(set_to_none=True)
            return None
        self._update(grad_norm)
        for losses in done:
            if self.momentum is not None and losses.enqueue is not None:
                self.momentum.queue.enqueue(*losses.enqueue)
        of_step = {"lr": rate, "grad_norm": float(grad_norm)}
        if "itc" in model.config.heads:
            of_step["scale"] = float(model.scale.detach())
        return StepDone(micro, done, of_step)

    def _set_rate(self, step: int) -> float:
        """Give the optimizer the learning rate of `step`; returns it."""
        config = self.config
        rate = learning_rate(
            step,
            steps=config.steps,
            peak=config.learning_rate,
            minimum=config.min_learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            decay_rate=config.decay_rate,
            steps_per_epoch=config.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def _tokenise(self, batch: Batch) -> StepInputs:
        """Return a batch as the objectives read it."""
        config = self.config
        part, num_rows = config.batch_size // self.world.size, len(batch.captions)
        if self.world.size > 1 and num_rows != part:
            raise TrainingError(
                f"rank {self.world.rank} was given {num_rows} pairs, but its part of batch_size "
                f"{config.batch_size} is {part}: `batches` must give each rank an equal part"
            )
        return StepInputs.from_batch(batch, self._tokenizer, config.prompt, config.max_text_tokens)

    def _grad_norm(self) -> Tensor:
        """Return the norm () of all gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return total_norm(grads, self.world)

    def _update(self, grad_norm: Tensor) -> None:
        """Do the optimizer's step with gradients clipped where asked.

        The fused optimizer divides gradients by `grad_scale` while it reads them anyway; clipping by itself
        would read and write all of them once more.
        """
        limit = self.config.grad_clip_norm
        if limit is not None:
            self.optimizer.grad_scale = ((grad_norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.step()


def _step_seed(seed: int, step: int, rank: int) -> int:
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
