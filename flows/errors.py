"""Errors of the seam.

FlowsError
|-- SettingsError(ValueError)   a preset, file or setting that cannot be used
|-- MissingInput                a stage was asked to run before what it needs exists
|-- WorkerDied                  processes of a stage ended again and again
`-- Stopped                     a stage was asked to end, and did
"""

from __future__ import annotations


class FlowsError(Exception):
    """Base of every error raised by `flows` itself."""


class SettingsError(FlowsError, ValueError):
    """Settings that cannot be used; the message names field, value and remedy."""


class MissingInput(FlowsError):
    """A stage needs something that no earlier stage has made yet; the message names the command."""


class WorkerDied(FlowsError):
    """Processes that share a stage died until there was no use in starting others; holds their last words."""


class Stopped(FlowsError):
    """A stage ended because it was asked to; `what` says what became of its shard."""

    def __init__(self, what: str) -> None:
        super().__init__(f"stopped as asked: {what}; the same command goes on from here")
        self.what = what
