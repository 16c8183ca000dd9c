"""What a finished training leaves in the lake: its history as rows, and a word when it learned nothing."""

from __future__ import annotations

import logging
from typing import Any

from blip_core.watch import CONSTANT_ITM_LOSS, ITM_TOLERANCE, NOT_REPEATABLE
from flows.steps.plan import TrainPlan
from storage import ModelRef

logger = logging.getLogger(__name__)

NOT_IN_CURVES = ("step", *NOT_REPEATABLE)
"""Of a history line: the step is the row's n, and speed and memory differ between equal runs."""


def curve_rows(
    plan: TrainPlan, ref: ModelRef, history: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The history as rows of `metrics`: dataset train-<plan>, n = step."""
    return [
        {
            "round": plan.round,
            "model_id": ref.model_id,
            "dataset": f"train-{plan.name}",
            "metric": metric,
            "value": value,
            "n": line["step"],
        }
        for line in history
        for metric, value in line.items()
        if metric not in NOT_IN_CURVES and value is not None
    ]


def warn_if_stuck(name: str, history: list[dict[str, Any]]) -> bool:
    """Say so when matching ended where a constant answer would: the filter would drop everything."""
    losses = [line["loss_itm"] for line in history if line.get("loss_itm") is not None]
    if not losses or abs(losses[-1] - CONSTANT_ITM_LOSS) > ITM_TOLERANCE:
        return False
    logger.warning(
        "%s: loss_itm ended at %.4f, what one constant answer gives (%.4f): matching has learned "
        "nothing yet. Train for more steps, raise the learning rate, or start from trained weights",
        name,
        losses[-1],
        CONSTANT_ITM_LOSS,
    )
    return True
