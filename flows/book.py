"""What a round's record holds beyond its settings: seconds and counts by stage, and the verdict."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from flows.session import Run
from flows.steps.gate import Verdict
from storage import rounds


class StageBook:
    """Collects counts and speed of a stage while it runs."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.speed: dict[str, float] = {}

    def count(self, name: str, value: int) -> None:
        """Note a count under `name`."""
        self.counts[name] = value


@contextmanager
def timed(run: Run, stage: str) -> Iterator[StageBook]:
    """Record a stage's wall seconds and counts in its round, the first time it is finished.

    A later run that finds everything committed does not touch the record.
    """
    book, began = StageBook(), time.monotonic()
    yield book
    record = rounds.read_round(run.lake, run.round)
    if record is None or stage in record.seconds:
        return
    seconds = {**record.seconds, stage: round(time.monotonic() - began, 3)}
    on_device = stage not in ("ingest", "decide", "report")
    device_seconds = {**record.device_seconds}
    if on_device:
        device_seconds[stage] = seconds[stage]
    rounds.write_round(
        run.lake,
        dataclasses.replace(
            record,
            seconds=seconds,
            device_seconds=device_seconds,
            counts={**record.counts, **book.counts},
            speed={**record.speed, **({stage: book.speed} if book.speed else {})},
        ),
    )


def note_speed(run: Run, training: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Record how fast a training went: medians of its history's lines, and the most memory.

    Not among the metrics: those are the same whenever a model is trained anew.
    """
    record = rounds.read_round(run.lake, run.round)
    lines = [line for line in history if "images_per_s" in line]
    if record is None or not lines:
        return
    speed = {"memory_gib": max(float(line["memory_gib"]) for line in lines)}
    for name in ("images_per_s", "mfu"):
        known = [float(line[name]) for line in lines if line[name] is not None]
        if known:
            speed[name] = statistics.median(known)
    changed = dataclasses.replace(record, speed={**record.speed, training: speed})
    rounds.write_round(run.lake, changed)


def finish_round(run: Run, verdict: Verdict, champion_id: str) -> None:
    """Close the round's record with the gate's verdict; a closed one stays as it is."""
    record = rounds.read_round(run.lake, run.round)
    assert record is not None, f"round {run.round} was never begun"
    if record.status != "running":
        return
    rounds.write_round(
        run.lake,
        dataclasses.replace(
            record,
            status=verdict.status,
            decided_by="gate",
            champion_after=champion_id,
            why=verdict.why,
            finished_at=datetime.now(UTC),
        ),
    )


def reopen_round(run: Run) -> None:
    """Take back the verdict of a round whose model was trained anew, so that the gate judges it."""
    record = rounds.read_round(run.lake, run.round)
    if record is not None and record.status != "running":
        reopened = dataclasses.replace(
            record,
            status="running",
            champion_after=None,
            why=None,
            finished_at=None,
            decided_by=None,
        )
        rounds.write_round(run.lake, reopened)
