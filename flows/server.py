"""A Prefect server and a process worker on this machine: `make up` and `make down`.

All state lies under `.prefect/` in the project's folder. `prefect.toml` beside it tells every
`prefect` command started in that folder where the API is.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil

from flows.errors import FlowsError

logger = logging.getLogger(__name__)

PREFERRED_PORT = 4200
PORT_VARIABLE = "BOOTSTRAP_PREFECT_PORT"
HEALTHY_WITHIN_S = 120
WORK_POOL = "default"
UNFINISHED = ("RUNNING", "PENDING", "CANCELLING")


class ServerFailed(FlowsError):
    """The server or the worker did not become healthy; the message names the log to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """What `up` started, so that `down` stops exactly that."""

    port: int
    server_pid: int
    server_started: float
    worker_pid: int
    worker_started: float

    @property
    def ui_url(self) -> str:
        """Address of the UI."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        """Address of the API."""
        return f"{self.ui_url}/api"


def up(project: Path) -> ServerState:
    """Start server and worker, deploy `prefect.yaml`, wait until all is healthy.

    Raises:
        ServerFailed: something did not start; what had started is stopped again.
    """
    if not (project / "prefect.yaml").is_file():
        raise ServerFailed(f"{project} holds no prefect.yaml; run this in the project's folder")
    state = running(project)
    if state is not None:
        logger.info("already up at %s; deploying again", state.ui_url)
        _deploy(project, state.api_url)
        return state
    _stop_leftovers(project)
    folder = project / ".prefect"
    folder.mkdir(exist_ok=True)
    port = _choose_port()
    api_url = f"http://127.0.0.1:{port}/api"
    server = _start(
        project, ["server", "start", "--host", "127.0.0.1", "--port", str(port)], "server"
    )
    started = [server]
    try:
        _wait_for(lambda: _healthy(api_url), server, folder / "server.log", "server")
        (project / "prefect.toml").write_text(
            f'# Written by `make up`.\n[api]\nurl = "{api_url}"\n\n'
            "[server]\nanalytics_enabled = false\n",
            encoding="utf-8",
        )
        crash_dead_runs(api_url)
        _deploy(project, api_url)
        worker_command = ["worker", "start", "--pool", WORK_POOL, "--type", "process"]
        worker = _start(project, worker_command, "worker", api_url)
        started.append(worker)
        _wait_for(lambda: _worker_online(api_url), worker, folder / "worker.log", "worker")
    except BaseException:
        for process in started:
            _terminate(process.pid)
        (project / "prefect.toml").unlink(missing_ok=True)
        raise
    state = ServerState(
        port=port,
        server_pid=server.pid,
        server_started=psutil.Process(server.pid).create_time(),
        worker_pid=worker.pid,
        worker_started=psutil.Process(worker.pid).create_time(),
    )
    (folder / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    return state


def down(project: Path) -> bool:
    """Stop what `up` started; False when nothing of it runs. Unfinished runs are set to crashed."""
    state = _read_state(project)
    if state is None:
        return False
    stopped = False
    if _alive(state.worker_pid, state.worker_started):
        _terminate(state.worker_pid)
        stopped = True
    if _alive(state.server_pid, state.server_started):
        if _healthy(state.api_url):
            crash_dead_runs(state.api_url)
        _terminate(state.server_pid)
        stopped = True
    (project / ".prefect" / "state.json").unlink(missing_ok=True)
    (project / "prefect.toml").unlink(missing_ok=True)
    return stopped


def running(project: Path) -> ServerState | None:
    """The state of a server and worker that both run and answer."""
    state = _read_state(project)
    if state is None:
        return None
    both = _alive(state.server_pid, state.server_started) and _alive(
        state.worker_pid, state.worker_started
    )
    return state if both and _healthy(state.api_url) else None


def crash_dead_runs(api_url: str) -> list[str]:
    """Set runs whose process on this machine is gone to Crashed, which frees their slots.

    A run that a killed worker left Running holds its deployment's only slot for minutes or for
    ever (measured: docs/decisions.md), and its successor would be cancelled.
    """
    crashed = []
    for run in _unfinished_runs(api_url):
        if _runs_here(run.get("infrastructure_pid")):
            continue
        message = "The process of this run is gone; set by `bootstrap up` or `down`."
        state = {"type": "CRASHED", "name": "Crashed", "message": message}
        _post(f"{api_url}/flow_runs/{run['id']}/set_state", {"state": state, "force": False})
        crashed.append(str(run["name"]))
    return crashed


def _unfinished_runs(api_url: str) -> Iterator[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": list(UNFINISHED)}}}, "limit": 200}
    yield from _post(f"{api_url}/flow_runs/filter", wanted)


def _runs_here(infrastructure_pid: str | None) -> bool:
    """Whether the process that a worker recorded (as host:pid or pid) is alive on this machine."""
    if not infrastructure_pid:
        return False
    number = infrastructure_pid.rpartition(":")[2]
    return number.isdigit() and psutil.pid_exists(int(number))


def _choose_port() -> int:
    wanted = os.environ.get(PORT_VARIABLE)
    if wanted:
        return int(wanted)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", PREFERRED_PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(project: Path, api_url: str | None = None) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PREFECT_HOME"] = str(project / ".prefect")
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment["DO_NOT_TRACK"] = "1"
    environment["PREFECT_API_URL"] = api_url or ""
    if not api_url:
        environment.pop("PREFECT_API_URL")
    return environment


def _start(
    project: Path, arguments: list[str], name: str, api_url: str | None = None
) -> subprocess.Popen[bytes]:
    log = project / ".prefect" / f"{name}.log"
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=project,
            env=_environment(project, api_url),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _deploy(project: Path, api_url: str) -> None:
    pool = ["work-pool", "create", WORK_POOL, "--type", "process", "--overwrite"]
    for arguments in (pool, ["deploy", "--all"]):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=project,
            env=_environment(project, api_url),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerFailed(
                f"`prefect {' '.join(arguments)}` failed ({done.returncode}):\n"
                f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )


def _wait_for(ready: Any, process: subprocess.Popen[bytes], log: Path, name: str) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while time.monotonic() < deadline:
        if ready():
            return
        if process.poll() is not None:
            break
        time.sleep(0.5)
    tail = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
    raise ServerFailed(f"the Prefect {name} did not become healthy; see {log}\n{tail}")


def _healthy(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _worker_online(api_url: str) -> bool:
    try:
        workers = _post(f"{api_url}/work_pools/{WORK_POOL}/workers/filter", {})
    except (URLError, OSError):
        return False
    return any(worker.get("status") == "ONLINE" for worker in workers)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or b"null")


def _read_state(project: Path) -> ServerState | None:
    path = project / ".prefect" / "state.json"
    try:
        return ServerState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _alive(pid: int, started: float) -> bool:
    """Whether this very process lives; a number alone may belong to another one by now."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False


def _stop_leftovers(project: Path) -> None:
    """A worker without its server, or the other way round, is stopped before a fresh start."""
    if _read_state(project) is not None:
        down(project)


def _terminate(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    family = [*parent.children(recursive=True), parent]
    for process in family:
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(family, timeout=15)
    for process in stubborn:
        _signal(process, "kill")


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return
