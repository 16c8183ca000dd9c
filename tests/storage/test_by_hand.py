"""Champions chosen by hand: refused with the reason, recorded, and whole under a kill and two at once."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from storage import by_hand, layout, registry, rounds
from storage.catalog import query
from storage.errors import ConfigError, LakeBusy
from storage.lake import Lake
from storage.registry import ModelRef

ROOT = Path(__file__).resolve().parents[2]


def _model(lake: Lake, folder: Path, round: int) -> ModelRef:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(f"weights {round}".encode())
    return registry.register(
        lake, folder, role="med", round=round, parent_id=None, trained_on=None, config={}
    )


def _round(lake: Lake, number: int, status: rounds.RoundStatus, before: str, after: str) -> None:
    record = rounds.begin_round(lake, number, {}, before)
    by = None if status == "running" else "gate"
    ended = {"status": status, "champion_after": after, "why": f"gate {number}", "decided_by": by}
    rounds.write_round(lake, replace(record, **ended))


@pytest.fixture
def judged(local_lake: Lake, tmp_path: Path) -> tuple[Lake, list[ModelRef]]:
    """Rounds 1 and 2 promoted, 3 refused, 4 waiting for a person, 5 unfinished."""
    models = [_model(local_lake, tmp_path / f"m{number}", number) for number in range(6)]
    ids = [model.model_id for model in models]
    for number in range(3):
        registry.promote(local_lake, ids[number], number, f"gate {number}")
    for number, status, before, after in (
        (1, "promoted", 0, 1),
        (2, "promoted", 1, 2),
        (3, "refused", 2, 2),
        (4, "needs a person", 2, 2),
        (5, "running", 2, 2),
    ):
        _round(local_lake, number, status, ids[before], ids[after])
    return local_lake, models


def _statuses(lake: Lake) -> dict[int, str]:
    rows = query(lake, "SELECT round, status FROM rounds").to_pylist()
    seen = {row["round"]: row["status"] for row in rows}
    assert seen == {record.round: record.status for record in rounds.list_rounds(lake)}
    return seen


def test_promote_makes_champion_and_records_who_said_so_and_why(
    judged: tuple[Lake, list[ModelRef]],
) -> None:
    lake, models = judged
    assert by_hand.promote(lake, 4, "looked at 100 captions") == models[4]
    assert registry.champion(lake) == models[4]
    record = rounds.read_round(lake, 4)
    assert record is not None
    assert (record.status, record.decided_by) == ("promoted", "hand")
    assert record.champion_after == models[4].model_id
    assert record.why == (
        "promoted by hand: looked at 100 captions; before that needs a person: gate 4"
    )
    last = query(lake, "FROM champions WHERE is_now").to_pylist()
    assert [(row["round"], row["action"], row["why"]) for row in last] == [
        (4, "promote", "looked at 100 captions")
    ]
    assert last[0]["changed_at"] is not None
    began = rounds.begin_round(lake, 6, {}, registry.champion(lake).model_id)  # type: ignore[union-attr]
    assert began.champion_before == models[4].model_id, "what a later round starts from"


def test_rollback_undoes_later_promotions_and_can_be_undone(
    judged: tuple[Lake, list[ModelRef]],
) -> None:
    lake, models = judged
    by_hand.roll_back(lake, 1, "round 2 reads badly")
    assert registry.champion(lake) == models[1]
    assert _statuses(lake) == {
        1: "promoted",
        2: "rolled back",
        3: "refused",
        4: "needs a person",
        5: "running",
    }
    assert query(lake, "SELECT model_id FROM models WHERE promoted").to_pylist() == [
        {"model_id": models[1].model_id}
    ]
    by_hand.roll_back(lake, 2, "a mistake")
    assert registry.champion(lake) == models[2]
    assert _statuses(lake)[2] == "promoted"
    by_hand.roll_back(lake, 0, "from the start")
    assert registry.champion(lake) == models[0]
    assert {_statuses(lake)[1], _statuses(lake)[2]} == {"rolled back"}
    history = query(lake, "SELECT round, action FROM champions ORDER BY place").to_pylist()
    assert [tuple(row.values()) for row in history] == [
        (0, "gate"),
        (1, "gate"),
        (2, "gate"),
        (1, "rollback"),
        (2, "rollback"),
        (0, "rollback"),
    ]


@pytest.mark.parametrize(
    ("decide", "round", "message"),
    [
        (by_hand.promote, 9, "has no round 9; there are 1, 2, 3, 4, 5"),
        (by_hand.promote, -1, "has no round -1"),
        (by_hand.promote, 5, "round 5 .* is not finished"),
        (by_hand.promote, 2, "is the champion already"),
        (by_hand.promote, 1, "bootstrap rollback 1"),
        (by_hand.promote, 0, "bootstrap rollback 0"),
        (by_hand.roll_back, 9, "has no round 9"),
        (by_hand.roll_back, 3, "never been champion.*bootstrap promote 3"),
        (by_hand.roll_back, 2, "is the champion already"),
    ],
)
def test_decision_by_hand_is_refused_and_changes_nothing_when(
    judged: tuple[Lake, list[ModelRef]], decide: object, round: int, message: str
) -> None:
    lake, _ = judged
    before = lake.root.read_bytes(layout.CHAMPION), _statuses(lake)
    with pytest.raises(ConfigError, match=message):
        decide(lake, round, "because")  # type: ignore[operator]
    assert (lake.root.read_bytes(layout.CHAMPION), _statuses(lake)) == before


def test_decision_by_hand_is_refused_without_a_reason_and_for_a_purged_round(
    judged: tuple[Lake, list[ModelRef]],
) -> None:
    lake, models = judged
    with pytest.raises(ConfigError, match="--because"):
        by_hand.promote(lake, 3, " ")
    lake.root.remove(layout.model_file(models[3].model_id, registry.WEIGHTS))
    with pytest.raises(ConfigError, match=r"round 3 .* was purged: models/.* is gone"):
        by_hand.promote(lake, 3, "because")
    lake.root.remove(layout.model_file(models[1].model_id, registry.WEIGHTS))
    with pytest.raises(ConfigError, match=r"round 1 .* was purged"):
        by_hand.roll_back(lake, 1, "because")


def test_decision_by_hand_waits_for_no_run(judged: tuple[Lake, list[ModelRef]]) -> None:
    lake, _ = judged
    with lake.lock("a run"), pytest.raises(LakeBusy, match="a run"):
        by_hand.promote(lake, 3, "because")
    assert registry.promotions(lake)[-1]["round"] == 2


ATTEMPT = """
import sys
from storage import Lake, by_hand, StorageError
lake = Lake.open(sys.argv[1])
sys.stdin.readline()
try:
    by_hand.promote(lake, int(sys.argv[2]), "at once")
    print("won")
except StorageError as err:
    print(type(err).__name__)
"""


def test_two_promotions_at_once_leave_one_history(judged: tuple[Lake, list[ModelRef]]) -> None:
    lake, models = judged
    attempts = [
        subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, lake.root.base, str(number)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (3, 4, 3, 4)
    ]
    for attempt in attempts:
        assert attempt.stdin is not None
        attempt.stdin.write("go\n")
        attempt.stdin.flush()
    said = [attempt.communicate(timeout=120)[0].strip() for attempt in attempts]
    won = [number for number, word in zip((3, 4, 3, 4), said, strict=True) if word == "won"]
    assert won, said
    assert set(said) <= {"won", "LakeBusy", "ConfigError"}
    history = [entry["round"] for entry in registry.promotions(lake)]
    assert history[:3] == [0, 1, 2]
    assert sorted(history[3:]) == sorted(won), "one entry for each that won, and no other"
    champion = registry.champion(lake)
    assert champion == models[history[-1]]
    for number in (3, 4):
        assert (_statuses(lake)[number] == "promoted") == (number in won)


KILLED = """
import os, signal, sys
from storage import Lake, by_hand
from storage.fs import Root
lake, place = Lake.open(sys.argv[1]), sys.argv[2]
original = Root.write_bytes
def write(self, rel, data):
    if place == "before" and rel == "champion.json":
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, rel, data)
    if place == "after" and rel == "champion.json":
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "records" and rel.endswith("record.json"):
        os.kill(os.getpid(), signal.SIGKILL)
Root.write_bytes = write
by_hand.roll_back(lake, 0, "killed")
"""


@pytest.mark.parametrize("place", ["before", "after", "records"])
def test_rollback_killed_anywhere_is_made_or_not_and_settled_by_the_next(
    judged: tuple[Lake, list[ModelRef]], place: str
) -> None:
    lake, models = judged
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, lake.root.base, place],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    made = place != "before"
    assert registry.champion(lake) == models[0 if made else 2]
    if made:
        with pytest.raises(ConfigError, match="is the champion already"):
            by_hand.roll_back(lake, 0, "killed")
    else:
        by_hand.roll_back(lake, 0, "killed")
    assert {_statuses(lake)[1], _statuses(lake)[2]} == {"rolled back"}
    assert [entry["round"] for entry in registry.promotions(lake)] == [0, 1, 2, 0]
