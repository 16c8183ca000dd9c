"""One engine for pretraining, finetuning the captioner, finetuning the filter, and retraining.

A batch is a pure function of the step, and every random draw of a step comes from (seed, step). A run that was
killed and started again therefore continues bit for bit as if nothing had happened, from the last checkpoint
in its folder.

Dimension key: B batch, S image side.
"""

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from blip_core.config import require, require_positive
from blip_core.errors import TrainingError
from blip_core.med import MED
from blip_core.momentum import MomentumEncoders
from blip_core.objectives import OBJECTIVES, Batch, Losses, Objective, StepInputs, compute_losses
from blip_core.schedule import SCHEDULES, Schedule, learning_rate, parameter_groups, ramp
from blip_core.tokenizer import MEDTokenizer
from blip_core.training_state import TrainingFolder, TrainingState

logger = logging.getLogger(__name__)

BatchSource = Callable[[int], Batch]
"""Gives the batch of a step; the same step always gives the same batch."""

MAX_SKIPPED_IN_A_ROW = 10
_UNCOMPARED = ("log_every_steps", "checkpoint_every_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train on a batch, and how."""

    objectives: tuple[Objective, ...] = OBJECTIVES
    """Any of itc, itm, lm; their losses are added."""
    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    """Peak, reached after warm-up."""
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Schedule = "cosine"
    weight_decay: float = 0.05
    adam_beta2: float = 0.999
    """AdamW's memory of squared gradients. 0.98 suits runs of a few hundred steps."""
    grad_clip_norm: float | None = 1.0
    """Largest gradient norm; None leaves gradients as they are."""
    label_smoothing: float = 0.1
    """Of the language-modelling loss. 0 with a vocabulary of a few dozen words."""
    distill_alpha: float = 0.4
    """Weight of the momentum encoders' soft targets in the contrastive loss."""
    alpha_ramp_steps: int = 0
    """Steps over which distill_alpha grows from 0."""
    momentum: float = 0.995
    """Of the momentum encoders, per step."""
    queue_size: int = 57600
    """Momentum features kept as further candidates of the contrastive loss."""
    prompt: str = ""
    """Put before every caption of the language-modelling objective; not supervised."""
    max_text_tokens: int = 30
    """Special tokens counted, prompt excluded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters stay float32."""
    seed: int = 0
    checkpoint_every_steps: int = 1000
    log_every_steps: int = 20
    freeze: tuple[str, ...] = ()
    """Prefixes of parameter names that are not trained, such as `vision`."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate")
        require_positive(self, "checkpoint_every_steps", "log_every_steps")
        known = set(self.objectives) <= set(OBJECTIVES) and len(self.objectives) > 0
        require(known, f"objectives must be some of {', '.join(OBJECTIVES)}; got {self.objectives}")
        require(
            self.schedule in SCHEDULES,
            f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}",
        )
        for name in ("min_learning_rate", "weight_decay", "warmup_steps", "alpha_ramp_steps"):
            require(
                getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}"
            )
        for name in ("label_smoothing", "distill_alpha", "momentum"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")
        require(0.0 < self.adam_beta2 < 1.0, f"adam_beta2 must be in (0, 1), got {self.adam_beta2}")
        require(self.queue_size >= 0, f"queue_size must be 0 or more, got {self.queue_size}")
        require(
            self.max_text_tokens >= 3,
            f"max_text_tokens must be 3 or more, got {self.max_text_tokens}",
        )
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"grad_clip_norm must be above 0 or None, got {self.grad_clip_norm}",
        )
        require(
            self.dtype in ("float32", "bfloat16"),
            f"dtype must be float32 or bfloat16, got {self.dtype!r}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainLog:
    """Means over the steps since the last line of the history; None for an objective not trained."""

    step: int
    loss: float
    loss_itc: float | None
    loss_itm: float | None
    loss_lm: float | None
    lr: float
    grad_norm: float
    scale: float
    itm_accuracy: float | None
    images_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    steps: int
    resumed_from: int
    """Step of the checkpoint that this call started from; 0 for a fresh start."""
    num_skipped: int
    """Steps left out because the loss was not finite."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """All lines of history.jsonl."""

    @property
    def final(self) -> dict[str, Any]:
        """The last line of the history; empty when nothing was logged."""
        return self.history[-1] if self.history else {}


def train(
    model: MED,
    tokenizer: MEDTokenizer,
    batches: BatchSource,
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_log: Callable[[TrainLog], None] | None = None,
) -> TrainResult:
    """Train `model` in place for `config.steps`, or continue the run that `folder` holds.

    `folder` gets step-000200/ checkpoints (the last two are kept), history.jsonl and run.json. A folder of a
    run with another configuration or another start is refused with a ConfigError naming the field. The next
    batch is prepared in a thread while a step computes; `batches` must not use torch's global generator.
    """
    require(
        tokenizer.vocab_size <= model.config.text.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} ids, but text.vocab_size is "
        f"{model.config.text.vocab_size}",
    )
    run = _Run(model.to(device), tokenizer, config, Path(folder), torch.device(device))
    try:
        return run.train(batches, on_log)
    finally:
        model.requires_grad_(True)
        model.eval()


class _Run:
    """Everything that one run carries from step to step."""

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.config, self.device = model, tokenizer, config, device
        self.folder = TrainingFolder(folder)
        settings = {k: v for k, v in asdict(config).items() if k not in _UNCOMPARED}
        self.folder.check_settings({"train": settings, "model": model.config.to_dict()}, model)
        _freeze(model, config.freeze)
        self.vision_frozen = not any(p.requires_grad for p in model.vision.parameters())
        needs_twins = "itc" in config.objectives
        self.momentum = MomentumEncoders(model, config.queue_size) if needs_twins else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            fused=True,
        )
        self.state = TrainingState()
        self.window_started = time.monotonic()

    def train(self, batches: BatchSource, on_log: Callable[[TrainLog], None] | None) -> TrainResult:
        """Run the remaining steps."""
        config = self.config
        self.state = self.folder.load_latest(self.model, self.optimizer, self.momentum)
        resumed_from = self.state.step
        if resumed_from:
            logger.info("training continues in %s at step %d", self.folder.path, resumed_from)
        self.folder.drop_history_after(resumed_from)
        self.model.train()
        if self.vision_frozen:
            self.model.vision.eval()
        self.window_started = time.monotonic()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as loader:
            upcoming = loader.submit(batches, resumed_from) if resumed_from < config.steps else None
            for step in range(resumed_from, config.steps):
                assert upcoming is not None
                batch = upcoming.result()
                if step + 1 < config.steps:
                    upcoming = loader.submit(batches, step + 1)
                self.step(step, batch)
                self.after_step(step + 1, on_log)
        return TrainResult(
            steps=config.steps,
            resumed_from=resumed_from,
            num_skipped=self.state.num_skipped,
            history=self.folder.read_history(),
        )

    def step(self, step: int, batch: Batch) -> None:
        """Do one optimizer step, or skip it when the loss is not finite."""
        config, model = self.config, self.model
        torch.manual_seed(_step_seed(config.seed, step))
        rate = learning_rate(
            step,
            steps=config.steps,
            peak=config.learning_rate,
            minimum=config.min_learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        model.clamp_scale()
        if self.momentum is not None:
            self.momentum.update(model, config.momentum)
        inputs = StepInputs.from_batch(batch, self.tokenizer, config.prompt, config.max_text_tokens)
        with self.autocast():
            losses = compute_losses(
                model,
                self.momentum,
                inputs.to(self.device),
                objectives=config.objectives,
                distill_alpha=ramp(step, config.distill_alpha, config.alpha_ramp_steps),
                label_smoothing=config.label_smoothing,
                vision_frozen=self.vision_frozen,
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        grad_norm = self.clip()
        if not bool(torch.isfinite(losses.total.detach()) & torch.isfinite(grad_norm)):
            self.skip(step)
            return
        self.optimizer.step()
        if self.momentum is not None and losses.enqueue is not None:
            self.momentum.queue.enqueue(*losses.enqueue)
        self.state.num_skipped_in_a_row = 0
        self.record(losses, grad_norm, rate, len(batch.captions))

    def clip(self) -> Tensor:
        """Clip gradients where asked; returns their norm () before that."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.config.grad_clip_norm
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)

    def skip(self, step: int) -> None:
        """Leave a step out; too many in a row end the run."""
        self.optimizer.zero_grad(set_to_none=True)
        self.state.num_skipped += 1
        self.state.num_skipped_in_a_row += 1
        logger.warning("step %d skipped: its loss or gradient is not finite", step)
        if self.state.num_skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss is not finite since step {step - MAX_SKIPPED_IN_A_ROW}, "
                f"{MAX_SKIPPED_IN_A_ROW + 1} steps in a row: lower learning_rate "
                f"(now {self.config.learning_rate}) or use dtype float32"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward pass runs."""
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def record(self, losses: Losses, grad_norm: Tensor, rate: float, num_images: int) -> None:
        """Add a step to the window that the next history line averages."""
        values = losses.numbers() | {
            "lr": rate,
            "grad_norm": float(grad_norm),
            "scale": float(self.model.scale.detach()),
        }
        window = self.state.window
        for name, value in values.items():
            window[name] = window.get(name, 0.0) + value
        window["num_steps"] = window.get("num_steps", 0.0) + 1
        window["num_images"] = window.get("num_images", 0.0) + num_images

    def after_step(self, step: int, on_log: Callable[[TrainLog], None] | None) -> None:
        """Log and checkpoint when it is time; `step` counts finished steps."""
        config, is_last = self.config, step == self.config.steps
        self.state.step = step
        if (step % config.log_every_steps == 0 or is_last) and self.state.window:
            log = self.take_log(step)
            self.folder.append_history(asdict(log))
            if on_log is not None:
                on_log(log)
        if step % config.checkpoint_every_steps == 0 or is_last:
            self.folder.save(self.state, self.model, self.optimizer, self.momentum)

    def take_log(self, step: int) -> TrainLog:
        """Return the window's means and start the next window."""
        window, now = self.state.window, time.monotonic()
        num_steps = window.pop("num_steps")
        num_images = window.pop("num_images")
        means: dict[str, float | None] = dict.fromkeys(_OPTIONAL_NUMBERS)
        means |= {name: total / num_steps for name, total in window.items()}
        self.state.window = {}
        seconds = max(now - self.window_started, 1e-9)
        self.window_started = now
        rounded = json.loads(json.dumps(means))
        return TrainLog(step=step, images_per_s=round(num_images / seconds, 1), **rounded)


_OPTIONAL_NUMBERS = ("loss_itc", "loss_itm", "loss_lm", "itm_accuracy")


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _freeze(model: MED, prefixes: tuple[str, ...]) -> None:
    model.requires_grad_(True)
    for prefix in prefixes:
        names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        require(bool(names), f"freeze: no parameter's name starts with {prefix!r}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
