"""What may pass by itself is tried again, with growing pauses, before the run hears of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from storage import TransientError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

PAUSES_S = (1.0, 5.0, 25.0)
"""Between tries; a stage of many shards would soon have used up the retries of its task."""


def patiently(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work(...)`, again after each TransientError; the last one is raised."""
    for pause_s in PAUSES_S:
        try:
            return work(*args, **kwargs)
        except TransientError as err:
            logger.warning("%s; again in %.0f s", err, pause_s)
            time.sleep(pause_s)
    return work(*args, **kwargs)
