"""How long a model's image encoder took, inside calls that do more than encode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EncodeClock:
    """Seconds in a model's `encode_image`; stays at 0 for a model that has no such function."""

    def __init__(self, owner: object) -> None:
        """`owner` is a captioner or a scorer, whose `model` encodes images."""
        self._model: Any = getattr(owner, "model", None)
        self._encode: Any = getattr(self._model, "encode_image", None)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[EncodeClock]:
        """Listen within the block: the model's own function is stood in for by one that looks at the clock."""
        if self._encode is None:
            yield self
            return
        self._model.encode_image = self._timed
        try:
            yield self
        finally:
            del self._model.encode_image

    def take(self) -> float:
        """Seconds since the last `take`; call it when the device has done its work."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        return seconds + sum(start.elapsed_time(end) for start, end in events) / 1000.0

    def _timed(self, pixel_values: Any) -> Any:
        device = getattr(self._model, "device", None) or next(self._model.parameters()).device
        if device.type != "cuda":
            began = time.perf_counter()
            try:
                return self._encode(pixel_values)
            finally:
                self._seconds += time.perf_counter() - began
        # A CUDA call returns before its work is done: the device's own clock is asked.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        encoded = self._encode(pixel_values)
        end.record()
        self._events.append((start, end))
        return encoded
