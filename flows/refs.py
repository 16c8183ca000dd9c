"""What crosses task borders: small frozen references, never images, tensors or tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage hands on: the committed parts it made or found, and its counts."""

    stage: str
    round: int
    parts: tuple[str, ...]
    """Lake-relative paths of the committed parts."""
    num_rows: int
    reused: int
    """Parts found committed with the same fingerprint."""

    @property
    def built(self) -> int:
        """Parts that this call wrote."""
        return len(self.parts) - self.reused
