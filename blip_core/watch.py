"""Watching a run: what a line of its history says, and the named warnings when it goes wrong.

The warnings are those that people report of BLIP's training: matching that stays at a constant answer, features
that all become alike, gradients that explode, losses that are not finite.
"""

import logging
import resource
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CONSTANT_ITM_LOSS = 0.6365
"""Nats of the best constant answer when a third of the pairs match (one positive, two negatives)."""
ITM_TOLERANCE = 0.005
NUM_STUCK_LINES = 5
COLLAPSED_COSINE = 0.99
NUM_COLLAPSED_LINES = 3
"""Lines in a row, after warm-up: features of random weights start alike too."""
EXPLODING_FACTOR = 10.0
NUM_NORMS = 20
"""History lines whose median is a usual gradient norm."""
MIN_NORMS = 5

NOT_FINITE = "not_finite"
"""Field of a history line that tells of a step left out, and the name of the warning."""
_NOT_FINITE_MESSAGE = (
    "a loss or gradient is NaN or infinite; such steps are left out. Lower learning_rate, lengthen "
    "warmup_steps, set grad_clip_norm, use dtype float32, or look for broken values in the batches"
)

NOT_REPEATABLE = ("images_per_s", "memory_gib", "mfu")
"""Fields of a history line that differ between two equal runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainLog:
    """Means over the steps since the last line of the history; None for what is not trained or not known."""

    step: int
    loss: float
    loss_itc: float | None = None
    loss_itm: float | None = None
    loss_lm: float | None = None
    lr: float
    grad_norm: float
    """Before clipping."""
    scale: float | None = None
    itm_accuracy: float | None = None
    itm_accuracy_positive: float | None = None
    """Of the matching pairs alone."""
    itm_accuracy_negative: float | None = None
    """Of the hard negatives alone."""
    image_cosine: float | None = None
    """Mean cosine between features of different images of a batch; 1 when they have collapsed."""
    text_cosine: float | None = None
    queue_alignment: float | None = None
    """Mean cosine between a sample's features and its momentum features, as the queue holds them."""
    images_per_s: float
    """Of all ranks."""
    memory_gib: float
    """Most memory so far: of the GPU, or of the process."""
    mfu: float | None = None
    """Useful operations a second over the device's peak, when `peak_flops` is given or known."""


MEANS = tuple(
    field.name
    for field in fields(TrainLog)
    if field.default is None and field.name not in NOT_REPEATABLE
)
"""Fields that a line has whether or not they are trained."""


def memory_gib(device: torch.device) -> float:
    """Return the most memory in GiB that the GPU, or else this process, has held."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)


def mean_cosine(features: Tensor) -> Tensor:
    """Return the mean cosine () between different rows of L2-normalised features (B, E); 0 of one row."""
    num_rows = len(features)
    total = features.sum(dim=0).square().sum() - features.square().sum()
    return total / max(1, num_rows * (num_rows - 1))


@dataclass(frozen=True, slots=True)
class Warned:
    """One named warning."""

    name: str
    """itm_stuck, collapsed_features, exploding_norm or not_finite."""
    step: int
    message: str


class Watch:
    """Reads history lines in order and warns once when something begins to go wrong.

    What it knows comes from the history alone: fed the old lines, a resumed run warns as one never stopped.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps
        self.warned: list[Warned] = []
        self._active: set[str] = set()
        self._num_stuck = 0
        self._num_collapsed = 0
        self._norms: deque[float] = deque(maxlen=NUM_NORMS)

    def see(self, line: Mapping[str, Any], *, quiet: bool = False) -> list[Warned]:
        """Take in one line; returns and logs (unless `quiet`) the warnings that begin with it."""
        problems: dict[str, str | None]
        if NOT_FINITE in line:
            problems = {NOT_FINITE: _NOT_FINITE_MESSAGE}
        elif "loss" not in line:
            return []  # an evaluation
        else:
            problems = {
                "itm_stuck": self._itm_stuck(line),
                "collapsed_features": self._collapsed(line),
                "exploding_norm": self._exploding(line),
                NOT_FINITE: None,
            }
        begun = []
        for name, message in problems.items():
            if message is not None and name not in self._active:
                begun.append(Warned(name, line["step"], message))
            (self._active.discard if message is None else self._active.add)(name)
        self.warned += begun
        for warning in begun if not quiet else ():
            logger.warning("%s at step %d: %s", warning.name, warning.step, warning.message)
        return begun

    def _itm_stuck(self, line: Mapping[str, Any]) -> str | None:
        loss = line.get("loss_itm")
        is_stuck = loss is not None and abs(loss - CONSTANT_ITM_LOSS) <= ITM_TOLERANCE
        past_warmup = line["step"] > self.warmup_steps
        self._num_stuck = self._num_stuck + 1 if is_stuck and past_warmup else 0
        if self._num_stuck < NUM_STUCK_LINES:
            return None
        return (
            f"loss_itm is {loss:.4f}, what one constant answer gives ({CONSTANT_ITM_LOSS}), in "
            f"{self._num_stuck} lines in a row: matching learns nothing. Start from trained weights, train "
            "longer, use hard_negatives_ramp_steps, a larger batch_size, or another learning_rate"
        )

    def _collapsed(self, line: Mapping[str, Any]) -> str | None:
        cosines = {side: line.get(f"{side}_cosine") for side in ("image", "text")}
        alike = {side: c for side, c in cosines.items() if c is not None and c > COLLAPSED_COSINE}
        past_warmup = line["step"] > self.warmup_steps
        self._num_collapsed = self._num_collapsed + 1 if alike and past_warmup else 0
        if self._num_collapsed < NUM_COLLAPSED_LINES:
            return None
        side, cosine = next(iter(alike.items()))
        return (
            f"{side} features are all alike (mean cosine {cosine:.4f}) in {self._num_collapsed} lines in a row: "
            "nothing can be told apart. Lower learning_rate, lengthen warmup_steps, use a shorter queue_size in "
            f"a short run, or look whether the batches hold one {side} over and over"
        )

    def _exploding(self, line: Mapping[str, Any]) -> str | None:
        norm, past = float(line["grad_norm"]), list(self._norms)
        self._norms.append(norm)
        if len(past) < MIN_NORMS or norm <= EXPLODING_FACTOR * statistics.median(past):
            return None
        return (
            f"grad_norm is {norm:.3g}, usual was {statistics.median(past):.3g}: lower learning_rate, lengthen "
            "warmup_steps, or set grad_clip_norm"
        )
