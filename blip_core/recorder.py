"""From the numbers of steps to the lines of a run's history.

Sums since the last line are part of a checkpoint, so that a resumed run writes the same means; speed is not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from blip_core.config import MEDConfig
from blip_core.distributed import World
from blip_core.flops import known_peak_flops, step_flops
from blip_core.objectives import StepInputs
from blip_core.train_config import TrainConfig
from blip_core.training_state import TrainingFolder, TrainingState
from blip_core.watch import MEANS, NOT_FINITE, TrainLog, Warned, Watch, memory_gib


class Recorder:
    """Averages steps over micro-batches, ranks and time; the first rank writes and warns."""

    def __init__(
        self,
        folder: TrainingFolder,
        config: TrainConfig,
        model_config: MEDConfig,
        device: torch.device,
        *,
        vision_frozen: bool,
    ) -> None:
        self.folder, self.config, self.device = folder, config, device
        self._model_config, self._vision_frozen = model_config, vision_frozen
        self._watch = Watch(config.warmup_steps)
        self._peak_flops = config.peak_flops or known_peak_flops(device)
        self._restart_clock()

    @property
    def world(self) -> World:
        """The ranks that the numbers come from."""
        return self.folder.world

    @property
    def warned(self) -> list[Warned]:
        """The named warnings of the whole run, in order."""
        return self._watch.warned

    def take_over(self, step: int) -> None:
        """Keep the history up to `step`, as if this process had written it, and start the clock."""
        self.folder.drop_history_after(step)
        for line in self.folder.read_history() if self.world.is_first else ():
            self._watch.see(line, quiet=True)
        self._restart_clock()

    def add(
        self,
        state: TrainingState,
        numbers: list[dict[str, float]],
        inputs: list[StepInputs],
        of_step: Mapping[str, float],
    ) -> None:
        """Add one step: the `numbers` of this rank's micro-batches, and what the step has only one of."""
        names = sorted(numbers[0])
        values = [each[name] for each in numbers for name in names]
        if len(numbers) * self.world.size > 1:
            table = torch.tensor(values, dtype=torch.float64, device=self.device)
            values = self.world.mean(table.view(len(numbers), -1).mean(dim=0)).tolist()
        for name, value in {**dict(zip(names, values, strict=True)), **of_step}.items():
            state.window[name] = state.window.get(name, 0.0) + value
        state.window["num_steps"] = state.window.get("num_steps", 0.0) + 1
        self._num_images += sum(len(each.image_ids) for each in inputs)
        self._num_flops += sum(self._flops(each) for each in inputs)

    def skip(self, step: int) -> None:
        """Write that optimizer step `step` (0-based) was left out, and warn when the first is."""
        line = {"step": step + 1, NOT_FINITE: 1.0}
        if self.world.is_first:
            self.folder.append_history(line)
            self._watch.see(line)

    def write(self, state: TrainingState, on_log: Callable[[TrainLog], None] | None) -> None:
        """Write the window's means as a line, warn where it goes wrong, and start the next window."""
        log = self._take(state)
        if self.world.is_first:
            self.folder.append_history(asdict(log))
            self._watch.see(asdict(log))
            if on_log is not None:
                on_log(log)

    def _take(self, state: TrainingState) -> TrainLog:
        num_steps = state.window.pop("num_steps")
        means: dict[str, Any] = dict.fromkeys(MEANS)
        means |= {name: total / num_steps for name, total in state.window.items()}
        state.window = {}
        seconds = max(time.monotonic() - self._started, 1e-9)
        num_images, num_flops = self._num_images, self._num_flops
        self._restart_clock()
        rate = num_flops / seconds
        return TrainLog(
            step=state.step,
            images_per_s=round(num_images * self.world.size / seconds, 1),
            memory_gib=memory_gib(self.device),
            mfu=round(rate / self._peak_flops, 4) if self._peak_flops else None,
            **means,
        )

    def _flops(self, inputs: StepInputs) -> float:
        per_image = step_flops(
            self._model_config,
            num_text_tokens=inputs.encoder_input_ids.shape[1],
            objectives=self.config.objectives,
            vision_frozen=self._vision_frozen,
        )
        return per_image * len(inputs.image_ids)

    def _restart_clock(self) -> None:
        self._started = time.monotonic()
        self._num_images = 0
        self._num_flops = 0.0
