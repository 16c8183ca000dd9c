"""A person's word on the champion: `promote` a round that the gate did not, `roll_back` to an earlier one.

champion.json is replaced in one move, and that is the decision; the records of the rounds follow it. A process that is
killed between the two leaves the decision made, and whoever works on the lake next writes the records (`settle`).
"""

import dataclasses
from datetime import UTC, datetime
from typing import Any

from storage import layout, registry, rounds
from storage.errors import ConfigError
from storage.lake import Lake
from storage.registry import WEIGHTS, ModelRef
from storage.rounds import RoundRecord


def promote(lake: Lake, round: int, because: str) -> ModelRef:
    """Make the model of a finished round the champion, whatever its gate said; returns the model.

    Raises LakeBusy while somebody works on the lake; ConfigError when the round is unknown, unfinished or
    purged, when its model is or was the champion, and without a reason.
    """
    with lake.lock(f"promote round {round}"):
        settle(lake)
        _need_reason(because)
        if round == 0:
            raise ConfigError(
                "round 0 is the first model, which was champion before round 1: `bootstrap rollback 0` goes back to it"
            )
        record = _known(lake, round)
        if record.status == "running":
            raise ConfigError(
                f"round {round} of {lake.uri} is not finished; run the command that began it again, and promote "
                "it when its gate has spoken"
            )
        ref = _model(lake, round)
        _not_now(lake, ref, round)
        if any(entry["model_id"] == ref.model_id for entry in registry.promotions(lake)):
            raise ConfigError(
                f"round {round} of {lake.uri} has been champion before; `bootstrap rollback {round}` goes back to it"
            )
        registry.promote(lake, ref.model_id, round, because, action="promote")
        settle(lake)
    return ref


def roll_back(lake: Lake, round: int, because: str) -> ModelRef:
    """Make the model of a round that was champion before the champion again; returns the model.

    Later rounds that had been promoted become `rolled back`; round 0 is the first model. Raises as `promote`,
    and ConfigError when the round's model was never champion.
    """
    with lake.lock(f"rollback to round {round}"):
        settle(lake)
        _need_reason(because)
        if round != 0:
            _known(lake, round)
        ref = _model(lake, round)
        _not_now(lake, ref, round)
        if not any(entry["model_id"] == ref.model_id for entry in registry.promotions(lake)):
            raise ConfigError(
                f"round {round} of {lake.uri} has never been champion, so there is nothing to go back to; "
                f"`bootstrap promote {round}` makes it champion"
            )
        registry.promote(lake, ref.model_id, round, because, action="rollback")
        settle(lake)
    return ref


def settle(lake: Lake) -> None:
    """Bring the records of the rounds in line with the last decision by hand; nothing when they are."""
    last = registry.last_promotion(lake)
    if last is None or last.get("action") not in ("promote", "rollback"):
        return
    for record in rounds.list_rounds(lake):
        settled = _settled(record, last)
        if settled is not None:
            rounds.write_round(lake, settled)
        elif record.decided_by == "hand" and not rounds.in_table(lake, record):
            rounds.write_round(lake, record)


def _settled(record: RoundRecord, last: dict[str, Any]) -> RoundRecord | None:
    """A round's record after a decision by hand; None when that leaves it as it is."""
    chosen, why = record.round == last["round"], last["why"]
    if chosen and record.status != "promoted":
        how = "promoted" if last["action"] == "promote" else "gone back to"
        why = f"{how} by hand: {why}; {_before(record)}"
        return dataclasses.replace(
            record,
            status="promoted",
            champion_after=last["model_id"],
            why=why,
            decided_by="hand",
            finished_at=record.finished_at or datetime.now(UTC),
        )
    undone = last["action"] == "rollback" and record.round > last["round"]
    if undone and record.status == "promoted":
        why = f"rolled back by hand to round {last['round']}: {why}; {_before(record)}"
        return dataclasses.replace(record, status="rolled back", why=why, decided_by="hand")
    return None


def _before(record: RoundRecord) -> str:
    """How the round stood until now, with the gate's reason if it was the gate that spoke last."""
    reason = "" if record.decided_by == "hand" or not record.why else f": {record.why}"
    return f"before that {record.status}{reason}"


def _need_reason(because: str) -> None:
    if not because.strip():
        raise ConfigError('a decision by hand needs a reason: --because "..."')


def _known(lake: Lake, round: int) -> RoundRecord:
    record = rounds.read_round(lake, round) if round > 0 else None
    if record is None:
        known = ", ".join(str(r.round) for r in rounds.list_rounds(lake)) or "none"
        raise ConfigError(
            f"lake {lake.uri} has no round {round}; there are {known} (`bootstrap rounds`)"
        )
    return record


def _model(lake: Lake, round: int) -> ModelRef:
    """The model of a round, with its files."""
    ref = registry.find(lake, "med", round)
    if ref is None:
        raise ConfigError(
            f"round {round} of {lake.uri} has no model; it was never trained, or its row is gone"
        )
    weights = layout.model_file(ref.model_id, WEIGHTS)
    if not lake.root.exists(weights):
        raise ConfigError(
            f"round {round} of {lake.uri} was purged: {weights} is gone, and a champion without "
            "weights starts no round; choose another round"
        )
    return ref


def _not_now(lake: Lake, ref: ModelRef, round: int) -> None:
    now = registry.champion(lake)
    if now is not None and now.model_id == ref.model_id:
        raise ConfigError(
            f"the model of round {round} ({ref.model_id[:8]}) is the champion already"
        )
