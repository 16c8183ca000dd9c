"""Rounds: what each was begun with, how it went, which champion it left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from storage import layout
from storage.errors import CorruptData, SettingsChanged
from storage.fingerprint import basis_of, canonical, explain
from storage.lake import Lake
from storage.tables import commit_part, committed_part, list_parts, read_part

RoundStatus = Literal["running", "promoted", "refused", "needs a person", "rolled back", "failed"]
"""`running` is unfinished; `rolled back` was champion until somebody went back to an earlier one."""

_MAPPINGS = ("settings", "counts", "seconds", "device_seconds", "speed")

PART = "round"
"""The name of the one part that a round has in the rounds table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """One row of the rounds table."""

    round: int
    status: RoundStatus = "running"
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    champion_before: str | None = None
    champion_after: str | None = None
    why: str | None = None
    started_at: datetime
    finished_at: datetime | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds by stage."""
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    speed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By training: images_per_s, memory_gib and, where the device's peak is known, mfu."""
    decided_by: Literal["gate", "hand"] | None = None
    """Who gave the status that it ended with; null while running and in records of older versions."""
    origin: str | None = None
    """What a later round started from and what was new then, in words."""

    def __post_init__(self) -> None:
        """Rounds count from 1."""
        if self.round < 1:
            raise ValueError(f"round must be 1 or more, got {self.round}")


def begin_round(
    lake: Lake,
    round: int,
    settings: Mapping[str, Any],
    champion_before: str | None = None,
    *,
    replace: bool = False,
) -> RoundRecord:
    """Begin a round, or go on with it; `settings` are those that shape the data.

    Raises SettingsChanged, naming each field, when the round was begun with others. With `replace`
    an unfinished round takes the new ones; what was made from the old ones is then made anew.
    """
    now = json.loads(canonical(settings))
    began = settings_of(lake, round)
    record = read_round(lake, round)
    unfinished = record is None or record.status == "running"
    if began is not None and began != now and unfinished:
        # A first attempt that failed at once, on a mistyped column say, pins nothing.
        began = None if replace or not _made_anything(lake, round) else began
    if began is not None and began != now:
        raise SettingsChanged(
            f"round {round} of {lake.uri} was begun with other settings: "
            f"{'; '.join(explain(began, now))}; give the old value, or "
            + (
                "run with --on-stale rebuild to go on with the new one"
                if unfinished
                else "run with --new-round to keep that round and start another"
            )
        )
    if began is None:
        lake.root.write_bytes(
            layout.round_settings(round), json.dumps(now, indent=2, sort_keys=True).encode()
        )
    if record is None or (began is None and record.settings != now):
        record = RoundRecord(
            round=round,
            settings=now,
            champion_before=champion_before,
            started_at=datetime.now(UTC),
        )
    if began is None or not in_table(lake, record):
        write_round(lake, record)
    return record


def _made_anything(lake: Lake, round: int) -> bool:
    """Whether any part of a round, or web pairs taken in by it, is committed."""
    tables = ("captions", "scores", "decisions", "models", "metrics")
    made = any(list_parts(lake, table, round) for table in tables)
    web = layout.web_shards(round)
    return made or any(part.name.startswith(web) for part in list_parts(lake, "pairs"))


def write_round(lake: Lake, record: RoundRecord) -> None:
    """Write the record of a round in place of the one before.

    The JSON record is replaced in one move and is what `read_round` reads; the part of the rounds
    table follows it, for SQL.
    """
    row = _packed(record)
    times = {name: _iso(row[name]) for name in ("started_at", "finished_at")}
    data = json.dumps(row | times, indent=2, sort_keys=True)
    lake.root.write_bytes(layout.round_record(record.round), data.encode())
    basis = basis_of("round", 1, {"round": record.round}, [])
    rows = pa.Table.from_pylist([row])
    commit_part(lake, "rounds", PART, rows, round=record.round, basis=basis)


def in_table(lake: Lake, record: RoundRecord) -> bool:
    """Whether the rounds table says what the record says; killed between the two, it does not."""
    ref = committed_part(lake, "rounds", PART, round=record.round)
    if ref is None:
        return False
    found = read_part(lake, ref).to_pylist()[0]
    row = _packed(record)
    return {name: found.get(name) for name in row} == row


def read_round(lake: Lake, round: int) -> RoundRecord | None:
    """The record of a round, None when it was never begun."""
    path = layout.round_record(round)
    try:
        return _unpacked(json.loads(lake.root.read_bytes(path)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptData(
            f"{lake.uri}/{path} is not readable ({err}); remove it and run the round again"
        ) from err


def list_rounds(lake: Lake) -> list[RoundRecord]:
    """All rounds in order; there are as many as there were turns of the cycle."""
    numbers = (int(name) for name in lake.root.list(layout.ROUNDS) if name.isdigit())
    records = (read_round(lake, number) for number in numbers)
    return sorted((r for r in records if r is not None), key=lambda record: record.round)


def latest_round(lake: Lake) -> RoundRecord | None:
    """The last round begun, None in a new lake."""
    return max(list_rounds(lake), key=lambda record: record.round, default=None)


def settings_of(lake: Lake, round: int) -> dict[str, Any] | None:
    """What a round was begun with, None when it was never begun."""
    path = layout.round_settings(round)
    try:
        settings = json.loads(lake.root.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise CorruptData(
            f"{lake.uri}/{path} is not readable ({err}); remove it and run the round again"
        ) from err
    assert isinstance(settings, dict), f"{path} holds {type(settings).__name__}, not an object"
    return settings


def _packed(record: RoundRecord) -> dict[str, Any]:
    """The record as a row of the table: mappings become JSON."""
    row = asdict(record)
    return row | {name: canonical(row[name]) for name in _MAPPINGS}


def _unpacked(row: dict[str, Any]) -> RoundRecord:
    times = {
        name: datetime.fromisoformat(row[name]) if row[name] else None
        for name in ("started_at", "finished_at")
    }
    row.setdefault("speed", "{}")  # records of older versions have none, nor the fields after it
    return RoundRecord(**row | times | {name: json.loads(row[name]) for name in _MAPPINGS})


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
