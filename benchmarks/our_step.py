"""blip_core's own training step, and batches to feed it and the baseline with."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from plain_blip import MAX_TOKENS, Recipe
from torch import Tensor

from blip_core import MED, Batch, MEDConfig, MEDTokenizer, TrainConfig
from blip_core.distributed import World
from blip_core.step import Stepper

WORDS = tuple(f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or"))


class OurStep:
    """What `train` does with a batch: a `Stepper`, its queue full."""

    def __init__(
        self, model: MED, tokenizer: MEDTokenizer, recipe: Recipe, device: torch.device
    ) -> None:
        config = TrainConfig(
            steps=1_000_000,
            batch_size=1,  # of no consequence in one process
            learning_rate=recipe.learning_rate,
            min_learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            weight_decay_on="all",
            grad_clip_norm=recipe.grad_clip_norm,
            label_smoothing=recipe.label_smoothing,
            distill_alpha=recipe.distill_alpha,
            momentum=recipe.momentum,
            queue_size=recipe.queue_size,
            max_text_tokens=MAX_TOKENS,
        )
        self.model = model.to(device)
        self.stepper = Stepper(self.model, tokenizer, config, World(), device)
        assert self.stepper.momentum is not None
        self.momentum = self.stepper.momentum.to(device)
        self._fill_queue()
        self._num_done = 0
        self._blocks = list(self.model.vision.blocks)
        self._compiled: list[Callable[..., Tensor] | None] = [None] * len(self._blocks)

    def compile(self) -> None:
        """Have the vision blocks compiled, as `TrainConfig.compile` does, for steps that ask for it."""
        for block in self._blocks:
            block.compile()
        self._compiled = [block._compiled_call_impl for block in self._blocks]

    def __call__(self, batch: Batch, dtype: str, *, compiled: bool = False) -> Tensor:
        """Do one step; returns the three losses (3,)."""
        stepper = self.stepper
        for block, call in zip(self._blocks, self._compiled, strict=True):
            block._compiled_call_impl = call if compiled else None
        if self._num_done == 0 or stepper.config.dtype != dtype:
            stepper.config = replace(stepper.config, dtype=dtype)
            stepper.begin()
        done = stepper.do(self._num_done, [batch])
        if done is None:
            raise SystemExit("a loss or gradient of ours is not finite")
        self._num_done += 1
        losses = done.losses[0]
        parts = (losses.loss_itc, losses.loss_itm, losses.loss_lm)
        return torch.stack([part.detach() for part in parts if part is not None])

    @torch.no_grad()
    def _fill_queue(self) -> None:
        """Fill the queue with random features, as after some thousand steps."""
        queue = self.momentum.queue
        width, size = queue.image_queue.shape
        features = F.normalize(torch.randn(2, size, width), dim=-1).to(queue.image_queue.device)
        ids = torch.arange(size, device=features.device)
        queue.enqueue(features[0], features[1], -1 - ids, -1 - ids)


def make_batch(config: MEDConfig, batch_size: int, longest: int, seed: int) -> Batch:
    """Random pixels, and captions of half of `longest` to `longest` tokens, one of them longest."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision.image_size_px
    low = max(1, longest // 2 - 2)
    lengths = torch.randint(low, longest - 1, (batch_size,), generator=generator)
    lengths[0] = longest - 2
    words = torch.randint(len(WORDS), (batch_size, longest), generator=generator)
    return Batch(
        pixel_values=torch.randn(batch_size, 3, side, side, generator=generator),
        captions=[
            " ".join(WORDS[w] for w in row[:length])
            for row, length in zip(words.tolist(), lengths.tolist(), strict=True)
        ],
        image_ids=[f"{seed}-{index}" for index in range(batch_size)],
    )
