"""`make up`, `prefect deployment run`, artifacts, slots: on a real server with a real worker."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cycle import ROOT, FinishedCycle, command_environment, copied, tiny_settings

from flows import server
from storage import Lake, query


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the repository's own, with its server and worker up."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "prefect.yaml", folder)
    (folder / "flows").symlink_to(ROOT / "flows")
    try:
        server.up(folder)
        yield folder
    finally:
        server.down(folder)


def _deployment_run(
    project: Path, name: str, settings: dict[str, Any], *, watch: bool = True
) -> subprocess.CompletedProcess[str]:
    """What a user types, in a shell that knows nothing but the folder it stands in."""
    arguments = ["deployment", "run", name, *(["--watch"] if watch else [])]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "prefect",
            *arguments,
            "--params",
            json.dumps({"settings": settings}),
        ],
        cwd=project,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def _state(project: Path) -> server.ServerState:
    state = server.running(project)
    assert state is not None
    return state


def _api(project: Path, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{_state(project).api_url}{path}",
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def _runs(project: Path, *states: str) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": list(states)}}}, "sort": "START_TIME_DESC"}
    return [run for run in _api(project, "/flow_runs/filter", wanted) if run["deployment_id"]]


def _wait(found: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.3)
    pytest.fail(f"not seen within {seconds} s")


def test_deployments_run_the_cycle_and_show_it(
    project: Path, world_folder: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    settings = tiny_settings(lake, world_folder)
    first = _deployment_run(project, "bootstrap/full-cycle", settings)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]

    artifacts = {artifact["key"]: artifact for artifact in _api(project, "/artifacts/filter")}
    for stage in ("ingest", "pretrain", "caption", "score", "retrain", "evaluate"):
        assert artifacts[f"{stage}-round-1"]["type"] == "progress"
        assert float(artifacts[f"{stage}-round-1"]["data"]) == 100.0
    funnel = json.loads(artifacts["funnel-round-1"]["data"])
    shown = {(row["stage"], row["outcome"]): row["rows"] for row in funnel}
    opened = Lake.open(str(lake), read_only=True)
    listed = query(opened, "SELECT count(*) AS n FROM pairs WHERE pool = 'web'").to_pylist()
    assert shown["urls", "listed"] == listed[0]["n"]
    assert "# Round 1: promoted" in artifacts["round-1"]["data"]
    assert "reports/round=0001/index.html" in artifacts["round-1"]["data"]

    asked = {"policies": ["raw", "percentile:share=0.4"], "seeds": 1, "steps": 3}
    asked["decodings"] = ["nucleus", "beam"]
    compared = _deployment_run(project, "compare/compare", settings | {"compare": asked})
    assert compared.returncode == 0, compared.stdout[-2000:] + compared.stderr[-2000:]
    artifacts = {artifact["key"]: artifact for artifact in _api(project, "/artifacts/filter")}
    for decoding in ("nucleus", "beam"):
        assert f"| percentile:share=0.4 | {decoding} |" in artifacts["compare-round-1"]["data"]
    assert float(artifacts["beam-captions-round-1"]["data"]) == 100.0
    assert "With one seed they say nothing" in artifacts["compare-round-1"]["data"]

    second = _deployment_run(project, "bootstrap/next-round", settings | {"cycle": "next-round"})
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    rounds = query(opened, "SELECT round FROM rounds ORDER BY round").to_pylist()
    assert [row["round"] for row in rounds] == [1, 2]


def test_mistyped_setting_is_refused_before_a_run_exists(project: Path) -> None:
    before = len(_api(project, "/flow_runs/filter", {"limit": 200}))
    refused = _deployment_run(project, "bootstrap/full-cycle", {"pretrain": {"stpes": 3}})
    assert refused.returncode != 0
    assert "stpes" in refused.stdout + refused.stderr
    assert len(_api(project, "/flow_runs/filter", {"limit": 200})) == before


def test_two_at_once_and_a_dead_run_whose_slot_is_freed(
    project: Path, world_folder: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tmp_path / "lake", world_folder)
    settings["pretrain"] = settings["pretrain"] | {"steps": 100_000}  # runs until it is killed
    _deployment_run(project, "bootstrap/full-cycle", settings, watch=False)
    running = _wait(lambda: _runs(project, "RUNNING"))[0]

    # Not watched: a run that is cancelled at once may be over before its watcher looks.
    _deployment_run(project, "bootstrap/full-cycle", settings, watch=False)
    cancelled = _wait(lambda: _runs(project, "CANCELLED"))[0]
    assert "concurrency limit" in cancelled["state"]["message"]

    _kill_everything(project)
    server.up(project)
    dead = _api(project, "/flow_runs/filter", {"flow_runs": {"id": {"any_": [running["id"]]}}})[0]
    assert dead["state"]["type"] == "CRASHED"
    ended = tiny_settings(tmp_path / "lake2", world_folder) | {"ingest": {"url_lists": []}}
    admitted = _deployment_run(project, "bootstrap/full-cycle", ended | {"world": None})
    last = _runs(project, "FAILED", "CANCELLED")[0]
    assert admitted.returncode == 1
    assert last["state"]["type"] == "FAILED", "it was let in, and failed for want of any input"
    assert "nothing to take in" in last["state"]["message"]


def test_starts_of_missed_weeks_make_one_round_and_say_what_became_of_the_other(
    project: Path, finished: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(finished, tmp_path)
    lake = Lake.open(str(cycle.lake), read_only=True)
    before = query(lake, "SELECT max(round) AS last FROM rounds").to_pylist()[0]["last"]
    name = "/deployments/name/bootstrap/next-round"
    with urllib.request.urlopen(f"{_state(project).api_url}{name}", timeout=20) as answer:
        deployment = json.loads(answer.read())["id"]
    settings = {**cycle.settings, "cycle": "next-round"}
    settings["decide"] = {"threshold": 0.15}  # a reason for a round
    missed = []
    for weeks in (2, 1):
        due = (datetime.now(UTC) - timedelta(weeks=weeks)).isoformat()
        start = {"parameters": {"settings": settings}, "state": {"type": "SCHEDULED"}}
        start["state"]["state_details"] = {"scheduled_time": due}
        missed.append(_api(project, f"/deployments/{deployment}/create_flow_run", start)["id"])

    def ended() -> list[dict[str, Any]]:
        found = _api(project, "/flow_runs/filter", {"flow_runs": {"id": {"any_": missed}}})
        ends = ("COMPLETED", "CANCELLED", "FAILED", "CRASHED")
        return found if all(run["state"]["type"] in ends for run in found) else []

    states = sorted(run["state"]["type"] for run in _wait(ended, seconds=300))
    assert states == ["CANCELLED", "COMPLETED"], (
        "all that were due start at once, and one has the slot"
    )
    rounds = query(lake, "SELECT round, origin FROM rounds ORDER BY round").to_pylist()
    assert rounds[-1]["round"] == before + 1, "one round, not one for each week"
    assert "decide.threshold: 0.2 -> 0.15" in rounds[-1]["origin"]


def test_down_stops_what_up_started(project: Path) -> None:
    state = server.running(project)
    assert state is not None
    assert server.down(project)
    for pid in (state.server_pid, state.worker_pid):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    assert server.running(project) is None
    assert not server.down(project), "nothing is left to stop"
    assert not (project / "prefect.toml").exists()


def _kill_everything(project: Path) -> None:
    """kill -9 of the worker, the flow's process and the server: what a power cut leaves."""
    state = server.running(project)
    assert state is not None
    for pid in (state.worker_pid, state.server_pid):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
        parent.wait(20)
