"""A clean end on SIGTERM: asked for by the signal, decided by the work, which says what became of its shard."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flows.errors import Stopped

logger = logging.getLogger(__name__)


class Stop:
    """Whether somebody asked for an end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Whether the work should come to an end."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask for an end."""
        self._asked.set()


@contextmanager
def stopped_by_sigterm() -> Iterator[Stop]:
    """Within the block SIGTERM only asks for an end; the work raises Stopped when it is ready.

    Then the signal goes on to whoever would have had it, such as Prefect, which ends the flow and the process. In a thread
    other than the main one signals are somebody else's, and nothing is asked.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    except Stopped as stopped:
        logger.warning("%s", stopped)
        signal.signal(signal.SIGTERM, before)
        _hand_on(before)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _hand_on(handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    """What the signal would have done; nothing where it would have ended the process without a word."""
    if callable(handler):
        handler(signal.SIGTERM, None)
