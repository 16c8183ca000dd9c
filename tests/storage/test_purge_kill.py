"""kill -9 at many moments of a purge, then the same command: the lake of an undisturbed one."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from purge_world import alt, around, list_parts_of_all, said_of, write_lake

from storage import query
from storage.errors import PurgeUnfinished
from storage.lake import Lake
from storage.purge import Request, asked_host, purge
from storage.tables import part_manifest, read_part

KILLER = Path(__file__).with_name("purge_killer.py")
ROOT = KILLER.parents[2]
HOST = "museum.test"
MOMENTS = (
    (2, "after"),
    (4, "after"),
    (7, "before"),
    (10, "after"),
    (11, "before"),
    (12, "after"),
    (11, "before"),
)
"""The move of each attempt at which it is killed: each goes on from where the one before it was."""


def attempt(lake: Lake, nth: int, when: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(KILLER), when, str(nth), lake.uri, HOST],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def state(lake: Lake) -> dict[str, object]:
    """All that a purge leaves: bytes of data, and of manifests what does not name a time or the purge itself."""
    found: dict[str, object] = {}
    for rel in lake.root.list_recursive(""):
        if rel.startswith(("shards/", "trainsets/", "reports/")) and not rel.endswith(".json"):
            found[rel] = hashlib.sha256(lake.root.read_bytes(rel)).hexdigest()
    for part in list_parts_of_all(lake):
        if part.table == "purged":
            rows = read_part(lake, part).drop_columns(["purge_id", "purged_at", "because"])
            found["purged"] = rows.to_pylist()
            continue
        manifest = part_manifest(lake, part)
        assert not manifest.coming
        told = (
            "fingerprint",
            "basis",
            "num_in",
            "num_ok",
            "reasons",
            "num_rows",
            "sha256",
            "purged",
        )
        found[part.path] = {name: getattr(manifest, name) for name in told}
    return found


def readers_are_served(lake: Lake) -> None:
    reader = Lake.open(lake.uri, read_only=True)
    assert query(reader, "SELECT count(*) AS n FROM pairs").to_pylist() == [{"n": 18}]
    for part in list_parts_of_all(reader):
        read_part(reader, part)
    query(reader, "FROM verdicts")
    query(reader, "FROM lineage")


def test_killed_again_and_again_a_purge_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole = write_lake(str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    lake = Lake.open(str(tmp_path / "killed"))
    purge(whole, Request(asked=(asked_host(HOST),), because="killed again and again"), around())
    for nth, when in MOMENTS:
        done = attempt(lake, nth, when)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        readers_are_served(lake)
        if lake.root.exists("purges/begun.json"):
            with pytest.raises(PurgeUnfinished), lake.lock("bootstrap"):
                pass
    done = attempt(lake, 10**6, "after")
    assert int(done.stdout) < 30, "most of it had been done by then"
    assert done.returncode == 0, done.stderr[-2000:]
    assert state(lake) == state(whole)
    assert said_of(lake, alt(0)) == []
    assert sorted(lake.root.list("purges")) == [f"{_purge_id(lake)}.json"]


def _purge_id(lake: Lake) -> str:
    rows = query(lake, "SELECT DISTINCT purge_id FROM purged").to_pylist()
    assert len(rows) == 1
    return str(rows[0]["purge_id"])
