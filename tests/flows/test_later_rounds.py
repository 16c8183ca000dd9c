"""A later round leaves an earlier one as it was, and a round that broke off is gone on with."""

import dataclasses
from pathlib import Path

import pytest
from cycle import (
    COMMITTED,
    FinishedCycle,
    bootstrap,
    copied,
    drop_later_rounds,
    file_hashes,
    stamps,
)
from lake_tables import CLEAN, LakeTables

from flows.quickstart.server import WorldServer
from flows.quickstart.world import WorldConfig, build_world
from flows.report import build_report
from flows.session import choose_round
from flows.settings import parse_settings
from storage import (
    DownloadConfig,
    Lake,
    UrlListConfig,
    commit_part,
    ingest_urls,
    layout,
    query,
    registry,
    rounds,
)
from storage.fingerprint import basis_of
from storage.rounds import RoundStatus
from storage.tables import rows_table

NOTHING = basis_of("test", 2, {}, [])


def _bring_urls(cycle: FinishedCycle, lake: Lake) -> int:
    """Begin the next round and take in a list with URLs that the lake does not know."""
    last = rounds.latest_round(lake)
    assert last is not None
    record = rounds.begin_round(lake, last.round + 1, last.settings, last.champion_after)
    drawn = WorldConfig(num_web=84, num_human=1, num_heldout=1, fault_share=0.0, seed=1)
    world = build_world(drawn, cycle.folder / "more")
    url_list = UrlListConfig(path=str(world.url_list), source_name_column="source_name")
    with WorldServer(world.folder) as server:
        config = DownloadConfig(http_proxy=server.url, shard_rows=50, threads=8)
        ingest_urls(lake, url_list, config, round=record.round)
    return record.round


def test_first_round_run_again_after_a_later_one_brought_urls_changes_nothing(
    finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    build_report(lake, 1, gallery_pairs=3)
    page = file_hashes(cycle.lake, "reports/round=0001")
    later = _bring_urls(cycle, lake)
    new = "SELECT status FROM pairs WHERE shard >= $first"
    assert query(lake, new, {"first": layout.web_shards(later)}).num_rows >= 15
    before = stamps(cycle.lake, *COMMITTED)
    again = bootstrap("run", "--config", str(cycle.config), cwd=tmp_path, api_url=api_url)
    assert again.returncode == 0, again.stdout[-1500:] + again.stderr[-1500:]
    assert "round 1: promoted" in again.stdout
    assert stamps(cycle.lake, *COMMITTED) == before
    assert file_hashes(cycle.lake, "reports/round=0001") == page


def test_report_of_a_round_is_the_same_after_a_later_one(tmp_path: Path) -> None:
    world = build_world(WorldConfig(num_web=20, num_human=1, num_heldout=1), tmp_path / "world")
    tables = LakeTables(world)
    lake = tables.commit(str(tmp_path / "lake"))
    page = lake.root.read_bytes(build_report(lake, 1, gallery_pairs=3))
    name = f"{layout.web_shards(2)}00-00000"
    pair = next(row for row in tables.rows["pairs"] if row["status"] == "ok")
    text = next(row for row in tables.rows["captions"] if row["source"] == "web")
    measured = {"model_id": CLEAN, "dataset": "heldout", "metric": "mean_recall", "value": 0.9}
    for table, number, row in (
        ("pairs", None, pair | {"key": "new", "image_id": "f" * 32, "shard": name}),
        ("captions", 0, text | {"caption_id": "e" * 32, "image_id": "f" * 32}),
        ("metrics", 2, measured | {"round": 2, "n": 500}),
    ):
        commit_part(lake, table, name, rows_table(table, [row]), round=number, basis=NOTHING)
    assert query(lake, "FROM pairs WHERE key = 'new'").num_rows == 1
    assert lake.root.read_bytes(build_report(lake, 1, gallery_pairs=3)) == page


def test_next_round_killed_before_its_report_writes_it_and_begins_no_other(
    finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    last = rounds.latest_round(lake)
    assert last is not None
    page = lake.root.read_bytes(build_report(lake, last.round, gallery_pairs=3))
    lake.root.remove(layout.report(last.round))
    before = stamps(cycle.lake, *COMMITTED)
    again = bootstrap("next-round", "--config", str(cycle.config), cwd=tmp_path, api_url=api_url)
    assert again.returncode == 0, again.stdout[-1500:] + again.stderr[-1500:]
    # Models this small are promoted or refused by the last digit of a machine's arithmetic.
    assert f"round {last.round}: {last.status}" in again.stdout
    assert lake.root.read_bytes(layout.report(last.round)) == page
    assert stamps(cycle.lake, *COMMITTED) == before


def test_round_after_a_refused_one_does_only_what_changed_and_keeps_every_real_pair(
    finished: FinishedCycle, tmp_path: Path, api_url: str
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake))
    drop_later_rounds(cycle.lake)
    record, first = rounds.read_round(lake, 1), registry.find(lake, "med", 0)
    assert record is not None
    assert first is not None
    # As if the gate had refused it: the next round starts from the same model as this one did.
    refused = dataclasses.replace(record, status="refused", champion_after=first.model_id)
    rounds.write_round(lake, refused)
    lake.root.remove(layout.CHAMPION)
    registry.promote(lake, first.model_id, 0, "the first model")
    median = "SELECT round(quantile_cont(itm_prob, 0.5), 6) AS cut FROM scores WHERE round = 1"
    cut = query(lake, median).to_pylist()[0]["cut"]
    done = bootstrap(
        "next-round",
        *("--config", str(cycle.config), "--set", f"decide.threshold={cut}"),
        cwd=tmp_path,
        api_url=api_url,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    for role in ("captioner", "filter"):
        made, taken = (registry.find(lake, role, number) for number in (1, 2))
        assert made is not None
        assert taken is not None
        assert taken.model_id == made.model_id
    second = rounds.read_round(lake, 2)
    assert second is not None
    assert "round 1 was refused" in (second.origin or "")
    assert f"decide.threshold: 0.2 -> {cut}" in (second.origin or "")
    for training in ("captioner", "filter"):
        assert training not in second.speed, "taken over, not trained"
    assert "retrain" in second.speed
    texts = "SELECT caption_id, caption, mean_logprob FROM captions WHERE round = {} ORDER BY ALL"
    assert query(lake, texts.format(1)).equals(query(lake, texts.format(2)))
    real = "SELECT caption_id FROM decisions WHERE source = 'web' AND round = {} ORDER BY ALL"
    assert query(lake, real.format(1)).num_rows > 30
    assert query(lake, real.format(1)).equals(query(lake, real.format(2)))


@pytest.mark.parametrize(
    ("status", "has_report", "expected"),
    [
        ("running", False, 3),
        ("promoted", False, 3),
        ("refused", False, 3),
        ("refused", True, 4),
        ("needs a person", True, 4),
        ("rolled back", True, 4),
    ],
)
def test_choose_round_adds_one_when_the_last_is_reported(
    tmp_path: Path, status: RoundStatus, has_report: bool, expected: int
) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    record = rounds.begin_round(lake, 3, {})
    rounds.write_round(
        lake, rounds.RoundRecord(round=3, status=status, started_at=record.started_at)
    )
    if has_report:
        lake.root.write_bytes(layout.report(3), b"<html>")
    settings = parse_settings({"preset": None, "cycle": "next-round"})
    assert choose_round(lake, settings, "bootstrap") == expected
    assert choose_round(lake, settings, "caption") == 3
    full = parse_settings({"preset": None})
    assert choose_round(lake, full, "bootstrap") == 1
