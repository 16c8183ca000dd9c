import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from storage import layout, rounds
from storage.catalog import query
from storage.errors import CorruptData, SettingsChanged
from storage.fingerprint import basis_of
from storage.lake import Lake
from storage.schemas import schema_of
from storage.tables import commit_part

SETTINGS = {"caption": {"top_p": 0.9}, "images": {"size_px": 64}}


def test_begin_round_goes_on_with_the_same_settings(lake: Lake) -> None:
    first = rounds.begin_round(lake, 1, SETTINGS, champion_before="m")
    again = rounds.begin_round(lake, 1, SETTINGS, champion_before="other")
    assert again == first
    assert again.champion_before == "m"


CHANGED = {"caption": {"top_p": 0.8}, "images": {"size_px": 64}}


def _make_something(lake: Lake, round: int) -> None:
    """One caption of the round: from now on its settings are pinned."""
    empty = schema_of("captions").empty_table()
    commit_part(lake, "captions", "web", empty, round=round, basis=basis_of("caption", 1, {}, []))


def test_begin_round_names_each_changed_setting_and_the_remedies(lake: Lake) -> None:
    record = rounds.begin_round(lake, 1, SETTINGS)
    _make_something(lake, 1)
    with pytest.raises(SettingsChanged, match=r"caption\.top_p: 0\.9 -> 0\.8.*--on-stale rebuild"):
        rounds.begin_round(lake, 1, CHANGED)
    rounds.write_round(lake, replace(record, status="refused"))
    with pytest.raises(SettingsChanged, match=r"caption\.top_p: 0\.9 -> 0\.8.*--new-round"):
        rounds.begin_round(lake, 1, CHANGED, replace=True)
    rounds.begin_round(lake, 2, CHANGED)


def test_begin_round_takes_new_settings_while_it_has_made_nothing(lake: Lake) -> None:
    rounds.begin_round(lake, 1, SETTINGS)
    assert rounds.begin_round(lake, 1, CHANGED).settings == CHANGED
    assert rounds.settings_of(lake, 1) == CHANGED


def test_begin_round_replaces_the_settings_of_an_unfinished_round_when_asked(lake: Lake) -> None:
    rounds.begin_round(lake, 1, SETTINGS)
    _make_something(lake, 1)
    assert rounds.begin_round(lake, 1, CHANGED, replace=True).settings == CHANGED


def test_round_record_is_replaced_and_seen_by_sql(lake: Lake) -> None:
    record = rounds.begin_round(lake, 1, SETTINGS)
    ended = replace(
        record,
        status="promoted",
        counts={"kept": 3},
        champion_after="m",
        finished_at=datetime.now(UTC),
        seconds={"score": 1.5},
    )
    rounds.write_round(lake, ended)
    assert rounds.read_round(lake, 1) == ended
    assert rounds.latest_round(lake) == ended
    rows = query(lake, "SELECT status, champion_after, counts FROM rounds").to_pylist()
    assert rows == [{"status": "promoted", "champion_after": "m", "counts": '{"kept":3}'}]


def test_round_record_of_an_older_version_has_no_speed(lake: Lake) -> None:
    record = rounds.begin_round(lake, 1, SETTINGS)
    path = layout.round_record(1)
    row = json.loads(lake.root.read_bytes(path))
    assert row.pop("speed") == "{}"
    lake.root.write_bytes(path, json.dumps(row).encode())
    assert rounds.read_round(lake, 1) == record
    rounds.write_round(lake, replace(record, speed={"retrain": {"images_per_s": 2.5}}))
    (found,) = query(lake, "SELECT speed FROM rounds").to_pylist()
    assert json.loads(found["speed"]) == {"retrain": {"images_per_s": 2.5}}


def test_begin_round_restores_the_row_when_killed_before_it(lake: Lake) -> None:
    record = rounds.begin_round(lake, 1, SETTINGS)
    lake.root.remove(layout.part_manifest("rounds", rounds.PART, 1))
    assert rounds.begin_round(lake, 1, SETTINGS) == record
    assert query(lake, "FROM rounds").num_rows == 1


def test_list_rounds_is_in_order(lake: Lake) -> None:
    assert rounds.latest_round(lake) is None
    for number in (2, 1, 10):
        rounds.begin_round(lake, number, SETTINGS)
    assert [r.round for r in rounds.list_rounds(lake)] == [1, 2, 10]


def test_round_record_names_the_field_when_out_of_range() -> None:
    with pytest.raises(ValueError, match="round must be 1 or more, got 0"):
        rounds.RoundRecord(round=0, started_at=datetime.now(UTC))


def test_read_round_names_the_file_when_torn(lake: Lake) -> None:
    lake.root.write_bytes(layout.round_record(1), b"{")
    with pytest.raises(CorruptData, match=r"0001/record\.json"):
        rounds.read_round(lake, 1)
