"""Records of finished intakes: a list that is in already costs one look, not a reading."""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from storage import layout
from storage.errors import CorruptData, StaleOutput
from storage.fingerprint import Basis, explain
from storage.lake import Lake
from storage.tables import OnStale, PartRef, committed_part, part_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IntakeRecord:
    """What an intake was made from and the parts it gave, pairs first, then captions."""

    basis: Basis
    parts: tuple[PartRef, ...]


def remember_intake(lake: Lake, round: int, name: str, record: IntakeRecord) -> None:
    """Write the record of a finished intake."""
    content = {"basis": record.basis, "parts": [asdict(ref) for ref in record.parts]}
    data = json.dumps(content, indent=2, sort_keys=True)
    lake.root.write_bytes(layout.intake_record(round, name), data.encode())


def finished_intake(
    lake: Lake, round: int, name: str, basis: Basis, on_stale: OnStale
) -> IntakeRecord | None:
    """The record when this intake is finished and all its parts stand; None to run it.

    Made from something else: StaleOutput naming what differs, or None with on_stale="rebuild".
    """
    path = layout.intake_record(round, name)
    try:
        content: dict[str, Any] = json.loads(lake.root.read_bytes(path))
        parts = tuple(PartRef(**ref) for ref in content["parts"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptData(
            f"{lake.uri}/{path} is not readable ({err}); remove it and run the ingest stage again"
        ) from err
    differs = explain(content["basis"], basis)
    if differs and on_stale == "error":
        raise StaleOutput(
            f"{path}: this was ingested from something else: {'; '.join(differs)}; give the old "
            "value, or run with --on-stale rebuild to ingest it anew, or with --new-round to keep "
            "it and add to it"
        )
    stand = all(committed_part(lake, p.table, p.name, round=p.round) == p for p in parts)
    if differs or not stand:
        logger.info("intake %s runs again: %s", name, "; ".join(differs) or "parts are missing")
        return None
    return IntakeRecord(basis=basis, parts=parts)


def num_ok_of(lake: Lake, parts: Iterable[PartRef]) -> int:
    """Images that some parts of `pairs` brought; parts of other tables are passed over."""
    return sum(part_manifest(lake, ref).num_ok for ref in parts if ref.table == "pairs")


def outcomes_of(lake: Lake, parts: Iterable[PartRef]) -> str:
    """The statuses of the rows of `pairs` that gave no image, the most frequent first."""
    counts: Counter[str] = Counter()
    for ref in parts:
        if ref.table == "pairs":
            counts.update(part_manifest(lake, ref).reasons)
    return ", ".join(f"{status} {n}" for status, n in counts.most_common()) or "no row"
