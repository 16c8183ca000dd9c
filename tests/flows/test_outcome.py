"""What a later round does, and says, after each way that the one before it may have ended."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.outcome import RoundOutcome, note_origin, nothing_new
from flows.session import Run
from flows.settings import parse_settings
from storage import Lake, by_hand, carried_part, commit_part, layout, query, registry, rounds
from storage.carry import carried_model
from storage.fingerprint import basis_of
from storage.rounds import RoundStatus
from storage.tables import rows_table

BASIS = basis_of("test", 1, {}, [])
SETTINGS = {"preset": None, "cycle": "next-round"}


def _model(lake: Lake, folder: Path, number: int, role: str = "med") -> registry.ModelRef:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(f"{role} {number}".encode())
    about = {"role": role, "round": number, "parent_id": None, "trained_on": None}
    return registry.register(lake, folder, config={"width": 8}, **about)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Round 1 promoted, round 2 judged (refused, until the test says otherwise)."""
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    models = [_model(lake, tmp_path / str(number), number) for number in range(3)]
    for number in (0, 1):
        registry.promote(lake, models[number].model_id, number, "better")
    settings = parse_settings(SETTINGS).as_basis()
    for number, before in ((1, None), (2, models[1].model_id)):
        rounds.begin_round(lake, number, settings, before)
    _end(lake, 1, "promoted")
    _end(lake, 2, "refused")
    return lake


def _end(lake: Lake, number: int, status: RoundStatus) -> None:
    record = rounds.read_round(lake, number)
    assert record is not None
    model = registry.find(lake, "med", number if status == "promoted" else number - 1)
    assert model is not None
    after = {"champion_after": model.model_id, "decided_by": "gate", "why": "as it was"}
    rounds.write_round(lake, replace(record, status=status, **after))


def _third(lake: Lake, **settings: Any) -> Run:
    """Round 3 as a scheduled run begins it."""
    parsed = parse_settings(SETTINGS | settings)
    champion = registry.champion(lake)
    assert champion is not None
    rounds.begin_round(lake, 3, parsed.as_basis(), champion.model_id)
    return Run(lake, parsed, 3)


def _add_web(lake: Lake, round: int) -> None:
    shard = f"{layout.web_shards(round)}00-00000"
    row = {
        "key": "k",
        "pool": "web",
        "row": 0,
        "source_name": "web",
        "url": "http://x",
        "status": "ok",
        "attempts": 1,
        "shard": shard,
        "offset": 0,
        "size": 1,
        "image_id": "e" * 32,
    }
    commit_part(lake, "pairs", shard, rows_table("pairs", [row]), basis=BASIS)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("refused", "round 2 was refused"),
        ("needs a person", 'round 2 waits for a person (`bootstrap promote 2 --because "..."`'),
        ("rolled back", "round 2 was rolled back"),
    ],
)
def test_round_is_not_run_when_it_would_repeat_the_last_and_says_how_that_ended(
    lake: Lake, status: RoundStatus, said: str
) -> None:
    _end(lake, 2, status)
    idle = nothing_new(_third(lake))
    assert isinstance(idle, RoundOutcome)
    assert idle.status == "nothing new"
    assert said in idle.why
    assert "add URLs, or change a setting" in idle.why
    assert rounds.read_round(lake, 3) is None
    assert query(lake, "SELECT max(round) AS last FROM rounds").to_pylist() == [{"last": 2}]


def test_round_runs_after_a_refused_one_when_urls_are_new_and_says_what_it_starts_from(
    lake: Lake,
) -> None:
    _add_web(lake, 3)
    run = _third(lake)
    assert nothing_new(run) is None
    origin = note_origin(run)
    champion = registry.find(lake, "med", 1)
    assert champion is not None
    assert origin == (
        f"starts from {champion.model_id[:8]} of round 1: round 2 was refused; new web images: 1; "
        "settings: as before"
    )
    assert query(lake, "SELECT origin FROM rounds WHERE round = 3").to_pylist() == [
        {"origin": origin}
    ]
    _add_web(lake, 4)
    assert note_origin(run) == origin, "written once"


def test_round_runs_when_a_setting_changed_and_names_it(lake: Lake) -> None:
    run = _third(lake, decide={"threshold": 0.6})
    assert nothing_new(run) is None
    assert "settings: decide.threshold: 0.5 -> 0.6" in (note_origin(run) or "")


def test_round_runs_from_a_model_that_was_promoted_by_hand(lake: Lake) -> None:
    chosen = by_hand.promote(lake, 2, "read 100 captions")
    run = _third(lake)
    assert nothing_new(run) is None
    assert (note_origin(run) or "").startswith(
        f"starts from {chosen.model_id[:8]} of round 2: round 2 was promoted"
    )


def test_round_after_a_rollback_does_not_repeat_what_was_rolled_back(lake: Lake) -> None:
    by_hand.promote(lake, 2, "a mistake")
    by_hand.roll_back(lake, 1, "as it was")
    idle = nothing_new(_third(lake))
    assert idle is not None
    assert "round 2 was rolled back" in idle.why


def test_rows_made_from_the_same_things_are_taken_over_and_others_are_not(lake: Lake) -> None:
    text = {"caption_id": "c", "image_id": "i", "source": "synthetic", "caption": "a cat"}
    rows = rows_table("captions", [text | {"status": "ok", "round": 2}])
    same, other = (basis_of("caption", 1, {"top_p": top_p}, [], "m") for top_p in (0.9, 0.8))
    commit_part(lake, "captions", "web", rows, round=2, basis=same)
    assert carried_part(lake, "captions", "web", round=3, basis=other) is None
    assert carried_part(lake, "captions", "other", round=3, basis=same) is None
    taken = carried_part(lake, "captions", "web", round=3, basis=same)
    assert taken is not None
    found = query(lake, "SELECT caption, round FROM captions ORDER BY round").to_pylist()
    assert found == [{"caption": "a cat", "round": 2}, {"caption": "a cat", "round": 3}]


def test_model_trained_from_the_same_things_is_taken_over_with_its_curve(
    lake: Lake, tmp_path: Path
) -> None:
    made = _model(lake, tmp_path / "filter", 2, "filter")
    curve = {"round": 2, "model_id": made.model_id, "dataset": "train-filter", "metric": "loss"}
    basis = basis_of("train-filter", 1, {}, [], "parent")
    rows = rows_table("metrics", [curve | {"value": 0.1, "n": 9}])
    commit_part(lake, "metrics", "train-filter", rows, round=2, basis=basis)
    taken = carried_model(lake, "train-filter", "filter", round=3, basis=basis)
    assert taken == replace(made, round=3)
    assert registry.find(lake, "filter", 3) == taken
    assert query(lake, "SELECT round FROM metrics WHERE value = 0.1").num_rows == 2
    lake.root.remove(layout.model_file(made.model_id, registry.WEIGHTS))
    assert carried_model(lake, "train-filter", "filter", round=4, basis=basis) is None
