"""One model of the runner: fed in batches that fit, its time counted, its failures kept to single rows."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from blip_core import ImageTransform
from flows.batch_size import BatchSize
from flows.encode_clock import EncodeClock
from flows.session import Run
from flows.steps.batches import batched, isolate
from flows.steps.shard_jobs import ShardJob
from flows.stream import Picture
from storage import ModelRef

R = TypeVar("R")
S = TypeVar("S")

Call = Callable[[Tensor, list[Picture]], list[R]]
"""(B, 3, S, S) and their B pictures -> one result each."""

SIZES_FILE = "batch_sizes.json"


class ModelRunner:
    """A captioner or a scorer at work."""

    def __init__(
        self, run: Run, stage: Literal["caption", "score"], model: Any, ref: ModelRef
    ) -> None:
        self.model = model
        self.which = 0
        """Which of a picture's pixels are this model's."""
        self._run, self._clock = run, EncodeClock(model)
        self._table, self._step = {
            "caption": ("captions", "generate"),
            "score": ("scores", "score"),
        }[stage]
        section = getattr(run.settings, stage)
        what = {
            "machine": platform.node(),
            "device": _device_name(run.device),
            "stage": stage,
            "model": ref.model_id,
            "settings": section.model_dump(mode="json", exclude={"batch_size"}),
        }
        path = run.lake.scratch() / SIZES_FILE
        self.size = BatchSize(section.batch_size, path, what, f"{stage}, {what['device']}")

    @property
    def transform(self) -> ImageTransform:
        """What makes of a picture what the model takes."""
        transform: ImageTransform = self.model.transform
        return transform

    def run(self, job: ShardJob, pictures: list[Picture], call: Call[R]) -> list[R | Exception]:
        """`call` on a batch; one that fails is split until what fails is alone."""

        def work(chosen: list[Picture]) -> list[R]:
            return self._call(chosen, call)

        began = time.perf_counter()
        with self._clock.running():
            if not self.size.is_known:
                self.size.settle(lambda count: self._trial(pictures, count, call))
                self._clock.take()
                began = time.perf_counter()
            results: list[R | Exception] = []
            while len(results) < len(pictures):
                chosen = pictures[len(results) :][: self.size.images]
                found = isolate(work, chosen, ran_out=self.size.ran_out)
                results += found
        encode_s = self._clock.take()
        job.timings[self._table][self._step] += time.perf_counter() - began - encode_s
        if encode_s:
            job.timings[self._table]["encode"] += encode_s
        return results

    def _call(self, pictures: list[Picture], call: Call[S]) -> list[S]:
        pixels = [picture.pixels[self.which] for picture in pictures]
        return call(batched(pixels, self.transform, self._run.device), pictures)

    def _trial(self, pictures: list[Picture], count: int, call: Call[R]) -> float:
        """Seconds that a batch of `count` takes, made of the pictures at hand."""
        chosen = [pictures[place % len(pictures)] for place in range(count)]
        began = time.perf_counter()
        self._call(chosen, call)
        return time.perf_counter() - began


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {torch.get_num_threads()} threads"
