"""Learning rate by step, and parameter groups (BLIP, section 4.1).

Warm-up is counted in optimizer steps over the whole run, not within one epoch.
"""

import math
from typing import Any, Literal

from torch import nn

from blip_core.config import require

Schedule = Literal["cosine", "linear", "constant", "step_decay", "epoch_decay"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant", "step_decay", "epoch_decay")
DecayScope = Literal["matrices", "all"]
DECAY_SCOPES: tuple[DecayScope, ...] = ("matrices", "all")

STEP_DECAY_PERIODS = 20
_MIN_WARMUP_LEARNING_RATE = 1e-6
_FRESH = ("cross_attention", "vision_proj", "text_proj", "itm_head", "lm_head", "logit_scale")
_POSITIONS = ("pos_embed", "cls_token", "position_embeddings")


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    minimum: float,
    warmup_steps: int,
    schedule: Schedule = "cosine",
    decay_rate: float = 0.9,
    steps_per_epoch: int | None = None,
) -> float:
    """Return the rate of optimizer step `step` (0-based) of a run of `steps`.

    `epoch_decay` is the released code's: peak * decay_rate ** (finished epochs of `steps_per_epoch`), never
    below `minimum`. `step_decay` is the same for a run of twenty epochs, whatever an epoch is.
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
    if schedule == "epoch_decay":
        require(steps_per_epoch is not None, "schedule epoch_decay needs steps_per_epoch")
        period = step // (steps_per_epoch or 1)
    else:
        period = min(STEP_DECAY_PERIODS - 1, step * STEP_DECAY_PERIODS // max(1, steps))
    return max(minimum, peak * float(decay_rate**period))


def ramp(step: int, value: float, ramp_steps: int) -> float:
    """Return `value`, reached linearly from 0 over the first `ramp_steps` steps."""
    return value * min(1.0, step / ramp_steps) if ramp_steps > 0 else value


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    scope: DecayScope = "matrices",
    *,
    fresh_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Split trainable parameters by what is decayed and by the factor `lr_scale` of their learning rate.

    `matrices` spares biases, norms, positions and the scale; `all` decays every parameter (the released code).
    `fresh_lr_scale` is the factor of the parts that no ViT or BERT can start: cross-attention and heads.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_spared = parameter.ndim < 2 or any(word in name for word in _POSITIONS)
        is_decayed = scope == "all" or not is_spared
        is_fresh = fresh_lr_scale != 1.0 and any(word in name for word in _FRESH)
        groups.setdefault((is_fresh, is_decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_decayed else 0.0,
            "lr_scale": fresh_lr_scale if is_fresh else 1.0,
        }
        for (is_fresh, is_decayed), parameters in sorted(groups.items(), reverse=True)
    ]
