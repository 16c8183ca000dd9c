"""How many images a model gets at a time: as set, or measured; halved when memory runs out, and remembered.

What is remembered lies beside other unfinished work of the lake, by machine, device, model and settings. No
fingerprint knows of it: the texts of captions do not depend on batches.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from storage import fingerprint

logger = logging.getLogger(__name__)

SMALLEST, LARGEST = 4, 1024
"""Sizes that are tried: powers of two from one to the other."""
WORTH = 1.05
"""A doubled batch must be faster by this factor to be worth its memory."""
TRIAL_S = 60.0
"""Seconds after which no larger batch is tried."""


class BatchSize:
    """The batch size of one model in one run."""

    def __init__(
        self, setting: int | Literal["auto"], path: Path, what: Mapping[str, Any], name: str
    ) -> None:
        """`path` is the file of remembered sizes; `what` says what they are good for."""
        self._path, self._name = path, name
        self._key = fingerprint("batch-size", 1, what, [])
        known = self._read().get(self._key, {})
        self._limit: int | None = known.get("limit")
        self._chosen: int | None = known.get("size") if setting == "auto" else int(setting)

    @property
    def is_known(self) -> bool:
        """Whether there is a size, set, measured or remembered."""
        return self._chosen is not None

    @property
    def images(self) -> int:
        """Images in a batch; SMALLEST while nothing is known."""
        size = self._chosen or SMALLEST
        return min(size, self._limit) if self._limit else size

    def settle(self, seconds_of: Callable[[int], float]) -> None:
        """Measure the size: `seconds_of(n)` runs a batch of n and says what it took."""
        self._chosen = fastest(seconds_of, LARGEST)
        logger.info("%s: batches of %d images, as measured", self._name, self._chosen)
        self._remember("size", self._chosen)

    def ran_out(self, size: int) -> None:
        """Note that a batch of `size` did not fit into memory: from now on half of it."""
        limit = max(1, size // 2)
        if self._limit is not None and self._limit <= limit:
            return
        self._limit = limit
        logger.warning(
            "%s: a batch of %d images does not fit into memory; from now on %d, remembered in %s",
            self._name,
            size,
            limit,
            self._path,
        )
        self._remember("limit", limit)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # nothing is lost but a measurement
        return found if isinstance(found, dict) else {}

    def _remember(self, field: str, value: int) -> None:
        known = self._read()
        known[self._key] = known.get(self._key, {}) | {field: value}
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
            partial.replace(self._path)
        except OSError as err:
            logger.warning("the batch size was not remembered: %s", err)


def fastest(seconds_of: Callable[[int], float], largest: int) -> int:
    """The smallest power of two that is about as fast as any, by trying; `largest` at most.

    Sizes double until that brings less than WORTH, memory runs out or TRIAL_S are over.
    """
    rates: dict[int, float] = {}
    size, began = SMALLEST, time.perf_counter()
    while size <= largest:
        try:
            if not rates:
                seconds_of(size)  # the first call of all also sets up what the others find
            rates[size] = size / max(seconds_of(size), 1e-9)
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            free_memory()
            break
        is_over = time.perf_counter() - began > TRIAL_S
        if is_over or (len(rates) > 1 and rates[size] < WORTH * rates[size // 2]):
            break
        size *= 2
    best = max(rates.values(), default=0.0)
    return next((size for size, rate in rates.items() if rate * WORTH >= best), 1)


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that a smaller batch might fit."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(err)
    return isinstance(err, RuntimeError) and any(
        words in told for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    )


def free_memory() -> None:
    """Give cached blocks back, so that a smaller batch finds them in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
