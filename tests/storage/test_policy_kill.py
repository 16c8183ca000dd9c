"""kill -9 in the middle of deciding, then the same again: the same bytes, and nobody saw half of it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rounds_of_rows import BASIS, caption, pair, scored

from storage.catalog import query
from storage.generations import active_generation
from storage.lake import Lake
from storage.policy import decide
from storage.tables import commit_part, list_parts, part_manifest, rows_table

KILLER = """
import os, signal, sys
from storage import candidates, generations, policy_run, tables
from storage.lake import Lake
from storage.policy import decide
candidates.CHUNK_TEXTS, tables.ROW_GROUP_ROWS = 10, 10
place, lake, seen = sys.argv[1], Lake.open(sys.argv[2]), []

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if place == "rows":
    inner = policy_run.PolicyRun.batches
    def batches(self):
        for batch in inner(self):
            seen.append(batch)
            if len(seen) == 3:
                die()
            yield batch
    policy_run.PolicyRun.batches = batches
elif place == "manifest":
    tables.write_manifest = die
else:
    from storage import policy
    policy.note_generation = die
with lake.lock("decide"):
    decide(lake, 1, "percentile", {"share": 0.5})
"""


def _shards(lake: Lake) -> None:
    for number in range(4):
        name = f"web-0001-00-{number:05d}"
        at = range(10 * number, 10 * number + 10)
        for table, round, rows in (
            ("pairs", None, [pair(i) | {"shard": name} for i in at]),
            ("captions", 0, [caption(f"w{i}", i, "web", 0) for i in at]),
            ("scores", 1, [scored(f"w{i}", i, (i * 37 % 101) / 100) for i in at]),
        ):
            commit_part(lake, table, name, rows_table(table, rows), round=round, basis=BASIS)


@pytest.mark.parametrize("place", ["rows", "manifest", "active"])
def test_decide_killed_and_run_again_gives_the_bytes_of_an_undisturbed_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.candidates.CHUNK_TEXTS", 10)
    monkeypatch.setattr("storage.tables.ROW_GROUP_ROWS", 10)
    undisturbed, lake = (Lake.open(str(tmp_path / n), create=True) for n in ("a", "b"))
    for each in (undisturbed, lake):
        _shards(each)
        decide(each, 1)
    expected = part_manifest(undisturbed, decide(undisturbed, 1, "percentile", {"share": 0.5}))
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, place, lake.uri], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    active = active_generation(lake, 1)
    assert active is not None
    assert active.policy == "blip", "what counted before still counts"
    assert query(lake, "SELECT DISTINCT policy FROM clean").to_pylist() == [{"policy": "blip"}]
    num_seen = 2 if place == "active" else 1
    assert len(list_parts(lake, "decisions", 1)) == num_seen
    with lake.lock("again"):
        found = part_manifest(lake, decide(lake, 1, "percentile", {"share": 0.5}))
    assert found.sha256 == expected.sha256
    assert query(lake, "SELECT DISTINCT policy FROM clean").to_pylist() == [
        {"policy": "percentile"}
    ]
    assert query(lake, "SELECT count(*) AS n FROM decisions").to_pylist() == [{"n": 80}]
