"""Progress of a stage, shown where somebody looks: Prefect's UI, the terminal, the log.

`StageProgress` is handed to steps as a callback, so steps know nothing of either.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from types import TracebackType
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext

logger = logging.getLogger(__name__)

Sink = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, note)."""

UPDATE_EVERY_S = 1.0

_sinks: list[Sink] = []


def add_sink(sink: Sink) -> None:
    """Also show progress through `sink`, such as the terminal's display."""
    _sinks.append(sink)


class StageProgress:
    """Context manager and callback `progress(done, total, note)`; updates at most once a second."""

    def __init__(self, stage: str, description: str, round: int) -> None:
        self._stage = stage
        self._description = description
        self._key = re.sub(r"[^a-z0-9]+", "-", f"{stage}-round-{round}".lower())
        self._artifact: UUID | None = None
        self._last = 0.0
        self._seen = (0, 0, "")

    def __enter__(self) -> StageProgress:
        self._publish(0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done, total, note = self._seen
        if error is None:
            self._show(total, total, note)
            self._publish(100.0, note)
        else:
            logger.warning("%s stopped at %d of %d: %s", self._stage, done, total, error)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` is done."""
        self._seen = (done, total, note)
        now = time.monotonic()
        if now - self._last < UPDATE_EVERY_S:
            return
        self._last = now
        self._show(done, total, note)
        self._publish(100.0 * done / total if total else 0.0, note)

    def _show(self, done: int, total: int, note: str) -> None:
        for sink in _sinks:
            sink(self._stage, done, total, note)

    def _publish(self, percent: float, note: str = "") -> None:
        if FlowRunContext.get() is None and TaskRunContext.get() is None:
            return
        if self._artifact is None:
            self._artifact = create_progress_artifact(  # type: ignore[assignment]
                progress=percent, key=self._key, description=self._description
            )
        else:
            description = f"{self._description}: {note}" if note else self._description
            update_progress_artifact(self._artifact, progress=percent, description=description)
