"""Learning rate by step, and parameter groups (BLIP, section 4.1).

Warm-up is counted in optimizer steps over the whole run, not within one epoch.
"""

import math
from typing import Any, Literal

from torch import nn

from blip_core.config import require

Schedule = Literal["cosine", "linear", "constant", "step_decay"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant", "step_decay")

STEP_DECAY_RATE = 0.9
STEP_DECAY_PERIODS = 20
_MIN_WARMUP_LEARNING_RATE = 1e-6
_POSITIONS = ("pos_embed", "cls_token", "position_embeddings")


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    minimum: float,
    warmup_steps: int,
    schedule: Schedule = "cosine",
) -> float:
    """Return the rate of optimizer step `step` (0-based) of a run of `steps`.

    `step_decay` is the reference's pretraining: peak * 0.9 ** (twentieths of the run that have passed).
    """
    require(
        schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}"
    )
    if step < warmup_steps:
        low = min(_MIN_WARMUP_LEARNING_RATE, peak)
        return low + (peak - low) * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "cosine":
        return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak + (minimum - peak) * progress
    period = min(STEP_DECAY_PERIODS - 1, step * STEP_DECAY_PERIODS // max(1, steps))
    return max(minimum, peak * float(STEP_DECAY_RATE**period))


def ramp(step: int, value: float, ramp_steps: int) -> float:
    """Return `value`, reached linearly from 0 over the first `ramp_steps` steps."""
    return value * min(1.0, step / ramp_steps) if ramp_steps > 0 else value


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters: matrices are decayed; biases, norms, positions and scale are not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_position = any(word in name for word in _POSITIONS)
        (kept if parameter.ndim < 2 or is_position else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
