"""One engine for pretraining, finetuning the captioner, finetuning the filter, and retraining.

A batch is a pure function of its number, and every random draw of a step comes from (seed, step, rank). A run
that was killed and started again therefore continues bit for bit as if nothing had happened, from the last
checkpoint in its folder. Several ranks (see `distributed`) train one model as one process with all their
batches would.

Dimension key: B batch, S image side.
"""

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip_core.config import require
from blip_core.distributed import World, current_world
from blip_core.errors import TrainingError
from blip_core.forward import arranged, is_finite, is_sharded
from blip_core.med import MED
from blip_core.objectives import Batch
from blip_core.recorder import Recorder
from blip_core.step import Stepper
from blip_core.tokenizer import MEDTokenizer
from blip_core.train_config import TrainConfig, compared_settings, completed_settings
from blip_core.training_state import TrainingFolder, TrainingState
from blip_core.watch import TrainLog, Warned

logger = logging.getLogger(__name__)

BatchSource = Callable[[int], Batch]
"""Gives batch number n of the data's order; the same number always gives the same batch.

Step s reads the `accumulate_steps` batches from s * accumulate_steps on. Inside a process group every rank asks
for the same numbers and is given its own equal part of each batch, in order of rank.
"""
Evaluate = Callable[[MED, int], Mapping[str, float]]
"""Gives numbers of the model in evaluation mode after a step; called on the first rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Finished steps; fewer than asked for when the run stopped early."""
    resumed_from: int
    """Step of the checkpoint that this call started from; 0 for a fresh start."""
    num_skipped: int
    """Steps left out because the loss was not finite."""
    best_step: int | None = None
    """Step of the model that the run ended with, when `best_metric` is given."""
    best_value: float | None = None
    warned: list[Warned] = field(default_factory=list)
    """Named warnings of the whole run, in order."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """All lines of history.jsonl, evaluations among them."""

    @property
    def final(self) -> dict[str, Any]:
        """The last line of the history that holds losses; empty when nothing was logged."""
        return next((line for line in reversed(self.history) if "loss" in line), {})


def train(
    model: MED,
    tokenizer: MEDTokenizer,
    batches: BatchSource,
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_log: Callable[[TrainLog], None] | None = None,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Train `model` in place for `config.steps`, or continue the run that `folder` holds.

    `folder` gets step-000200/ checkpoints (the last few are kept), history.jsonl and run.json. A folder of a
    run with another configuration or another start is refused with a ConfigError naming the field. The next
    batch is prepared in a thread while a step computes; `batches` must not use torch's global generator.

    Inside a process group all ranks call this with the same arguments, and a folder that all of them see.
    With `config.sharding` "full" a split copy is trained; `model` waits whole in the host's memory, and is given
    the weights for evaluations and in the end. With `config.best_metric`, `evaluate` must give a number of that name, and the model ends as the best.

    Raises:
        ConfigError: a setting does not fit the model, the tokenizer, the ranks or the folder.
        TrainingError: too many steps in a row were not finite; the model is back at the last checkpoint.
    """
    _check_fits(model, tokenizer, config)
    require(
        (config.best_metric is None) == (evaluate is None),
        f"best_metric is {config.best_metric!r} and evaluate is {'' if evaluate else 'not '}given: "
        "both or neither",
    )
    # a model that is split goes to the device part by part
    model.to("cpu" if is_sharded(config, current_world()) else device)
    try:
        run = _Run(model, tokenizer, config, Path(folder), torch.device(device))
        run.evaluate = evaluate
        with arranged(run.stepper.model, config):
            return run.train(batches, on_log)
    finally:
        model.to(device)
        model.requires_grad_(True)
        model.eval()


class _Run:
    """Everything that one run carries from step to step."""

    evaluate: Evaluate | None = None

    def __init__(
        self,
        model: MED,
        tokenizer: MEDTokenizer,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config, self.world, self.device = config, current_world(), device
        _check_batch(config, self.world)
        self.folder = TrainingFolder(folder, num_kept=config.keep_checkpoints, world=self.world)
        settings = compared_settings(config, model.config)
        self.folder.check_settings(settings, model, completed_settings)
        _freeze(model, config.freeze)
        self.stepper = Stepper(model, tokenizer, config, self.world, device)
        self.state = TrainingState()
        self.recorder = Recorder(
            self.folder, config, model.config, device, vision_frozen=self.stepper.vision_frozen
        )

    def train(self, batches: BatchSource, on_log: Callable[[TrainLog], None] | None) -> TrainResult:
        """Run the remaining steps."""
        config = self.config
        resumed_from = self.resume()
        self.stepper.begin()
        self.recorder.take_over(resumed_from)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as loader:

            def read(num_ahead: int) -> Future[list[Batch]] | None:
                if self.state.step + num_ahead >= config.steps or self.state.is_stopped:
                    return None
                first = self.state.num_batches + num_ahead * config.accumulate_steps
                numbers = range(first, first + config.accumulate_steps)
                return loader.submit(lambda: [batches(number) for number in numbers])

            upcoming = read(0)
            while upcoming is not None:
                current = upcoming.result()
                upcoming = read(1)
                self.step(current)
                self.after_step(on_log)
                if self.state.is_stopped:
                    break
        return self.result(resumed_from)

    def resume(self) -> int:
        """Load the last checkpoint, if any; returns its step."""
        self.state = self.load()
        step, old_size = self.state.step, self.state.world_size
        if step and self.world.is_first:
            logger.info("training continues in %s at step %d", self.folder.path, step)
        if step and old_size != self.world.size and self.world.is_first:
            logger.warning(
                "this run was trained by %d ranks until step %d and goes on with %d: batches and their order "
                "stay the same, but random draws and bits may differ from an unchanged run",
                old_size,
                step,
                self.world.size,
            )
        was, now = self.state.is_sharded, is_sharded(self.config, self.world)
        if step and old_size == self.world.size and was != now and self.world.is_first:
            logger.warning(
                "this run's weights were %s until step %d and are %s from now on: sums are taken in another "
                "order, so bits may differ from an unchanged run",
                "split" if was else "whole on every rank",
                step,
                "split" if now else "whole on every rank",
            )
        self.state.world_size, self.state.is_sharded = self.world.size, now
        return step

    def load(self) -> TrainingState:
        """Load the last good checkpoint, if any."""
        stepper = self.stepper
        return self.folder.load_latest(stepper.model, stepper.optimizer, stepper.momentum)

    def step(self, batches: list[Batch]) -> None:
        """Do one optimizer step, or skip it when it is not finite."""
        done = self.stepper.do(self.state.step, batches)
        self.state.num_batches += len(batches)
        if done is None:
            self.skip(self.state.step)
            return
        self.state.num_skipped_in_a_row = 0
        numbers = [losses.numbers() for losses in done.losses]
        self.recorder.add(self.state, numbers, done.inputs, done.of_step)

    def skip(self, step: int) -> None:
        """Leave a step out; too many in a row end the run at its last good checkpoint."""
        self.state.num_skipped += 1
        self.state.num_skipped_in_a_row += 1
        if self.world.is_first:
            logger.warning("step %d skipped: its loss or gradient is not finite", step)
        self.recorder.skip(step)
        limit = self.config.max_skipped_in_a_row
        if self.state.num_skipped_in_a_row > limit:
            back = self.load().step
            self.stepper.whole_model()
            where = f"the model is back at step {back}" if back else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss is not finite since step {step - limit}, {limit + 1} steps in a row; {where}: "
                f"lower learning_rate (now {self.config.learning_rate}) or use dtype float32"
            )

    def after_step(self, on_log: Callable[[TrainLog], None] | None) -> None:
        """Evaluate, log and checkpoint when it is time."""
        config, state = self.config, self.state
        state.step += 1
        is_last = state.step == config.steps
        every = config.evaluate_every_steps
        if self.evaluate is not None and (is_last or (every and state.step % every == 0)):
            self.judge(self.evaluate)
            is_last = is_last or state.is_stopped
        if (state.step % config.log_every_steps == 0 or is_last) and state.window:
            self.recorder.write(state, on_log)
        if state.step % config.checkpoint_every_steps == 0 or is_last:
            self.checkpoint(is_last)

    def judge(self, evaluate: Evaluate) -> None:
        """Evaluate the model; keep it when it is the best so far, stop the run when none gets better."""
        config, state, name = self.config, self.state, self.config.best_metric or ""
        is_better, is_stopped = False, False
        model = self.stepper.whole_model()
        if self.world.is_first:
            model.to(self.device).eval()
            with torch.no_grad():
                numbers = {k: float(v) for k, v in evaluate(model, state.step).items()}
            require(
                name in numbers, f"best_metric {name!r} is not in what evaluate gave: {[*numbers]}"
            )
            self.folder.append_history({"step": state.step, **numbers})
            value, best = numbers[name], state.best_value
            sign = 1.0 if config.best_mode == "min" else -1.0
            is_better = math.isfinite(value) and (best is None or sign * value < sign * best)
            if is_better:
                state.best_step, state.best_value = state.step, value
                self.folder.save_best(state.step, model)
            if model is not self.stepper.model:
                model.to("cpu")
            state.num_worse = 0 if is_better else state.num_worse + 1
            is_stopped = config.patience is not None and state.num_worse >= config.patience
        self.stepper.train_mode()
        state.best_step = self.world.from_first(state.best_step)
        state.is_stopped = bool(self.world.from_first(int(is_stopped)))

    def checkpoint(self, is_last: bool) -> None:
        """Save the run, unless its weights are broken: then the checkpoint before stays the last good one."""
        stepper = self.stepper
        if is_finite(stepper.model, self.world):
            self.folder.save(self.state, stepper.model, stepper.optimizer, stepper.momentum)
            return
        problem = f"weights are not finite after step {self.state.step}; no checkpoint is written"
        if is_last:
            raise TrainingError(f"{problem}: lower learning_rate (now {self.config.learning_rate})")
        logger.warning("%s", problem)

    def result(self, resumed_from: int) -> TrainResult:
        """Load the best model where one is asked for, and say how the run ended."""
        state, best_step, model = self.state, None, self.stepper.whole_model()
        if self.config.best_metric is not None and state.best_step:
            best_step = state.best_step
            self.folder.load_best(best_step, model)
        return TrainResult(
            steps=state.step,
            resumed_from=resumed_from,
            num_skipped=state.num_skipped,
            best_step=best_step,
            best_value=state.best_value,
            warned=self.recorder.warned,
            history=self.folder.read_history(),
        )


def _check_fits(model: MED, tokenizer: MEDTokenizer, config: TrainConfig) -> None:
    """Raise ConfigError before any compute when the model cannot be trained so on such texts."""
    text = model.config.text
    require(
        tokenizer.vocab_size <= text.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} ids, but text.vocab_size is {text.vocab_size}",
    )
    for objective in config.objectives:
        model.require_head(objective, f"training on {objective}")
    if "itm" in config.objectives:
        model.require_head("itc", "training on itm, whose negatives are drawn by similarity,")
    longest = config.max_text_tokens
    if "lm" in config.objectives and config.prompt:
        longest += len(tokenizer.prompt_ids(config.prompt)) - 1
    require(
        longest <= text.max_positions,
        f"max_text_tokens {config.max_text_tokens} and the prompt make texts of up to {longest} tokens, but "
        f"text.max_positions is {text.max_positions}: lower max_text_tokens",
    )


def _check_batch(config: TrainConfig, world: World) -> None:
    require(
        config.batch_size % world.size == 0,
        f"batch_size {config.batch_size} cannot be shared equally by {world.size} ranks: use a multiple "
        "of the ranks, or fewer ranks",
    )
    rows = config.batch_size * config.accumulate_steps
    require(
        config.queue_size == 0 or "itc" not in config.objectives or config.queue_size >= rows,
        f"queue_size {config.queue_size} is smaller than the {rows} pairs of one step (batch_size x "
        "accumulate_steps): use 0 for no queue, or at least one step's pairs",
    )


def _freeze(model: MED, prefixes: tuple[str, ...]) -> None:
    model.requires_grad_(True)
    for prefix in prefixes:
        part = prefix.rstrip(".")  # whole parts of a name: `vision` is not `vision_proj`
        names = [name for name, _ in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        require(bool(names), f"freeze: no parameter's name starts with {prefix!r}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
