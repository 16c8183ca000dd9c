"""Ray for real: the same tables as with multiprocessing, nothing fetched unchecked, nothing left when it is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hostile_web import TRAP, HostileWeb, serve
from intake_runs import processes_of, start
from test_faults import assert_same
from web_world import write_list

from storage import DownloadConfig, Lake, query
from storage.errors import ConfigError
from storage.intake import leftovers

CONFIG: dict[str, Any] = {
    "allow_addresses": ["127.0.0.1/32"],
    "shard_rows": 20,
    "processes": 2,
    "threads": 4,
    "per_host": 8,
    "retry_passes": 0,
}
RAY = CONFIG | {"distributor": "ray"}
PICTURES = 120
WORKER = "ray::_downloaded"
"""What Ray calls a worker that downloads a shard."""


@dataclass
class Web:
    """A web, a list of it, and the lake that multiprocessing made of the list."""

    web: HostileWeb
    path: Path
    lake: Lake
    asked: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("fetched")
    with serve() as web:
        web.robots = (200, "User-agent: *\nDisallow: /secret/\n")
        pages = [web.url(f"ok.jpg?n={n}") for n in range(PICTURES)]
        pages[5::20] = [web.url(f"secret/{n}.jpg") for n in range(len(pages[5::20]))]
        pages[7::20] = [web.url(f"tagged.jpg?tag=noai&n={n}") for n in range(len(pages[7::20]))]
        blocked = f"http://{TRAP}:{web.trap_port}"
        pages[9::20] = [f"{blocked}/{n}" for n in range(len(pages[9::20]))]
        pages[11::20] = [web.url(f"to?where={blocked}/{n}") for n in range(len(pages[11::20]))]
        path = write_list(folder / "urls.parquet", [(page, f"{page}, a page") for page in pages])
        lake = Lake.open(str(folder / "lake"), create=True)
        assert start(lake, path, CONFIG).wait(120) == 0
        yield Web(web, path, lake, asked=dict(web.requests))


@contextmanager
def _begun(*given: Any, **environment: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A run that is killed when the test is over, should it still be there."""
    run = start(*given, **environment)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def _wait_for(
    what: Callable[[], object], run: subprocess.Popen[bytes], longest_s: float = 90.0
) -> None:
    """Until something is true; AssertionError when the run ends before, or never gets there."""
    until = time.monotonic() + longest_s
    while not what():
        assert run.poll() is None, "the run ended before"
        assert time.monotonic() < until, "the run does not get there"
        time.sleep(0.02)


def _rays(lake: Lake, name: str) -> list[int]:
    """Processes of a lake's Ray whose command begins so."""
    found = []
    for process in processes_of(lake.scratch()):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if os.path.basename(command.split(b"\0")[0].split(b" ")[0]).startswith(name.encode()):
            found.append(process)
    return found


def _folders(lake: Lake) -> list[Path]:
    """Temporary folders of a lake's Ray."""
    found = set()
    for process in _rays(lake, "raylet"):
        environ = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found |= {line for line in environ if line.startswith(b"BOOTSTRAP_RAY_FOLDER=")}
    return [Path(line.decode().partition("=")[2]) for line in found]


def test_ray_gives_the_tables_of_multiprocessing_and_asks_what_it_asks(
    fetched: Web, tmp_path: Path
) -> None:
    web, home = fetched.web, tmp_path / "home"
    home.mkdir()
    web.requests.clear()
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    with _begun(lake, fetched.path, RAY | {"host_delay_s": 0.03}, HOME=str(home)) as run:
        _wait_for(lambda: len(_rays(lake, WORKER)) == 2, run)
        # Those that outlive a killed raylet are marked as well.
        assert _rays(lake, "ray::RuntimeEnvAgent")
        assert _rays(lake, "ray::DashboardAgent")
        assert _listening(processes_of(lake.scratch())) == {"loopback"}
        (folder,) = _folders(lake)
        assert folder.stat().st_mode & 0o77 == 0
        assert run.wait(120) == 0
    assert_same(lake, fetched.lake)
    statuses = query(lake, "SELECT DISTINCT status FROM pairs ORDER BY 1").to_pydict()["status"]
    assert statuses == ["blocked_address", "ok", "opted_out", "robots"]
    assert web.requests == fetched.asked
    assert not [page for page in web.requests if page.startswith("/secret")]
    assert web.requests["/robots.txt"] == 1
    assert web.trapped == []
    assert web.agents == {"blip-bootstrap/0.1"}
    assert processes_of(lake.scratch()) == []
    assert not folder.exists()
    assert list(home.iterdir()) == []


def _listening(processes: list[int]) -> set[str]:
    """Where sockets of some processes listen: `loopback`, or the address."""
    theirs = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                theirs.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in theirs:
                # Little endian: 127.0.0.1, and the same as IPv6.
                host = parts[1].partition(":")[0]
                found.add("loopback" if host.endswith("0100007F") else host)
    return found


def test_ray_killed_anywhere_the_tables_are_the_same_and_nothing_is_left(
    fetched: Web, tmp_path: Path
) -> None:
    web, lake = fetched.web, Lake.open(str(tmp_path / "lake"), create=True)
    web.requests.clear()
    errors, slow = tmp_path / "errors", RAY | {"host_delay_s": 0.05, "processes": 1}
    with errors.open("wb") as stderr, _begun(lake, fetched.path, slow, stderr=stderr) as run:
        for name in (WORKER, "raylet"):
            seen = web.requests.total()
            _wait_for(lambda: web.requests.total() > seen + 3 and _rays(lake, name), run)  # noqa: B023
            before = set(processes_of(lake.scratch()))
            os.kill(_rays(lake, name)[0], signal.SIGKILL)
            # Begun again, by processes none of which was there.
            _wait_for(lambda: not before & set(processes_of(lake.scratch())), run)  # noqa: B023
        seen = web.requests.total()
        _wait_for(lambda: web.requests.total() > seen + 3 and _rays(lake, WORKER), run)
        (folder,) = _folders(lake)
    assert "img2dataset lost a worker; restarting" in errors.read_text()
    # The run is killed by now.
    until = time.monotonic() + 30
    while processes_of(lake.scratch()) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_of(lake.scratch()) == [], "the killed run has left processes"
    assert not folder.exists()
    assert start(lake, fetched.path, RAY).wait(120) == 0
    assert_same(lake, fetched.lake)
    assert web.trapped == []
    assert not [page for page in web.requests if page.startswith("/secret")]
    assert processes_of(lake.scratch()) == []


UNMARKED = f"""
import os, sys
if any(each.endswith("default_worker.py") for each in sys.orig_argv):
    del os.environ[{leftovers.OWNER!r}]
"""
"""A sitecustomize.py: workers of Ray's do not know that they are to install the opener."""


def test_ray_without_the_opener_asks_for_nothing(fetched: Web, tmp_path: Path) -> None:
    web, lake = fetched.web, Lake.open(str(tmp_path / "lake"), create=True)
    web.requests.clear()
    (tmp_path / "sitecustomize.py").write_text(UNMARKED)
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        run = start(
            lake,
            fetched.path,
            # As a proxy it sees whatever any process of Ray's asks for, too.
            RAY | {"max_restarts": 0, "http_proxy": web.url("").rstrip("/")},
            stderr=stderr,
            PYTHONPATH=str(tmp_path),
        )
        assert run.wait(120) != 0
    assert "downloads nothing: no opener" in errors.read_text()
    assert dict(web.requests) == {}
    assert web.trapped == []


def test_ray_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"ingest\.distributor: ray needs .*pip install 'blip-bootstrap\[ray\]'"
    ):
        DownloadConfig(distributor="ray")
    DownloadConfig()


@pytest.mark.parametrize("address", ["auto", "10.0.0.7:6379", "ray://head:10001"])
def test_ray_elsewhere_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=rf"cannot join the one at RAY_ADDRESS={address}.*unset"):
        DownloadConfig(distributor="ray")
    DownloadConfig()


def test_distributor_is_no_part_of_what_is_stored() -> None:
    assert DownloadConfig(distributor="ray").data_settings() == DownloadConfig().data_settings()
    with pytest.raises(ConfigError, match="distributor must be multiprocessing or ray, got 'dask'"):
        DownloadConfig(distributor="dask")  # type: ignore[arg-type]
