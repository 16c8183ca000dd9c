"""kill -9 in the middle of every stage, then the same command: the tables of an undisturbed run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cycle import (
    FinishedCycle,
    bootstrap,
    command_environment,
    file_hashes,
    table_contents,
    tiny_settings,
    write_settings,
)

from storage import Lake, query

PLACES = [
    "download",
    "pairs:2",
    "train:pretrain",
    "metrics:1",
    "train:captioner",
    "train:filter",
    "captions:2",
    "scores:2",
    "decisions:1",
    "canaries:1",
    "judgements:1",
    "audit:1",
    "train:retrain",
    "heldout:2",
    "promote",
    "report",
]
"""In the order of the cycle: each run goes on from where the one before it was killed."""


@pytest.fixture(scope="module")
def undisturbed(finished: FinishedCycle) -> FinishedCycle:
    return finished


def test_killed_in_every_stage_the_cycle_ends_with_the_same_tables(
    undisturbed: FinishedCycle, world_folder: Path, tmp_path: Path, api_url: str
) -> None:
    lake = tmp_path / "lake"
    settings = write_settings(tmp_path / "tiny.yaml", tiny_settings(lake, world_folder))
    for place in PLACES:
        killed = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killer.py")), place, str(settings)],
            cwd=tmp_path,
            env=command_environment(api_url),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert killed.returncode == -signal.SIGKILL, f"{place}: {killed.stderr[-2000:]}"
        _readers_see_committed_rows_only(lake)
    done = bootstrap("run", "--config", str(settings), cwd=tmp_path, api_url=api_url)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    expected = {k: v for k, v in table_contents(undisturbed.lake).items() if _of_round_1(k)}
    found = table_contents(lake)
    assert found.keys() == expected.keys()
    for part, rows in expected.items():
        assert found[part] == rows, part
    for folder in ("shards", "tables/captions", "tables/decisions"):
        ours = file_hashes(lake, folder)
        theirs = file_hashes(undisturbed.lake, folder)
        parquet = {k: v for k, v in ours.items() if not k.endswith(".json")}
        assert parquet == {k: v for k, v in theirs.items() if k in parquet}, folder
    assert not list(lake.rglob("_tmp-*.parquet"))


def _of_round_1(part: str) -> bool:
    return "round=0002" not in part


def _readers_see_committed_rows_only(lake: Path) -> None:
    """Whatever lies around half-written, a question is answered and no row is there twice."""
    if not (lake / "lake.json").is_file():
        return
    opened = Lake.open(str(lake), read_only=True)
    for table, key in (("pairs", '"row", pool'), ("scores", "caption_id, round")):
        sql = f"SELECT {key} FROM {table} GROUP BY ALL HAVING count(*) > 1"
        assert query(opened, sql).num_rows == 0, table
