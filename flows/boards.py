"""Curves for those who watch: TensorBoard always, Weights & Biases where it is installed and set up."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

WANDB_SETTINGS = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL")
"""Weights & Biases is used only when one of its own variables is set: nothing is sent unasked."""


class Boards:
    """Where one training's curves are drawn. Neither board can stop a run."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._tensorboard = SummaryWriter(folder)
        self._wandb = _start_wandb(folder, name, config)

    def __enter__(self) -> Boards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Draw the values that there are at `step`."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)


def _start_wandb(folder: Path, name: str, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases that goes on where a killed one stopped; None where it is not set up."""
    is_wanted = any(os.environ.get(variable) for variable in WANDB_SETTINGS)
    if not is_wanted or importlib.util.find_spec("wandb") is None:
        return None
    import wandb

    try:
        return wandb.init(
            dir=str(folder), name=name, id=name, resume="allow", config=dict(config), reinit=True
        )
    except (wandb.errors.Error, OSError) as err:
        logger.warning("Weights & Biases does not start, curves go without it: %s", err)
        return None
