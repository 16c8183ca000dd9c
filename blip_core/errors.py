"""Errors of blip_core, one small tree.

    BlipError
    |-- ConfigError (ValueError)      a setting, name or folder the user gave
    |-- CheckpointError               weights that do not fit, or cannot be read
    |   `-- CorruptCheckpoint         a file whose bytes are not what was saved
    |-- DecodeError                   image bytes that are not a usable picture
    `-- TrainingError                 a run that cannot go on (loss is not finite)

Every message names the thing, the value and the remedy.
"""


class BlipError(Exception):
    """Base of every error raised on purpose by blip_core."""


class ConfigError(BlipError, ValueError):
    """A setting or an input is wrong; the message names it and its bound."""


class CheckpointError(BlipError):
    """Weights do not fit the model they were meant for, or are not there."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint file is damaged; the message names the file."""


class DecodeError(BlipError):
    """Bytes cannot be decoded to a picture; `reason` is short and stable, fit for a table."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class TrainingError(BlipError):
    """Training cannot go on; the message names the step."""
