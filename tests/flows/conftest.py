"""One undisturbed cycle and one Prefect server, shared by the tests of the flows."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cycle import (
    COMMITTED,
    FinishedCycle,
    bootstrap,
    command_environment,
    stamps,
    tiny_settings,
    write_settings,
)


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server on a free port of loopback."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        env=command_environment() | {"PREFECT_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=(home / "server.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()[-2000:]
                time.sleep(0.5)
        else:
            pytest.fail("the Prefect server did not become healthy")
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world") / "world"


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, world_folder: Path
) -> Iterator[FinishedCycle]:
    """The cycle as a user without a server runs it: URL list to report, undisturbed.

    Tests come in any order and in several processes: who changes the lake takes a copy.
    """
    folder = tmp_path_factory.mktemp("finished")
    lake = folder / "lake"
    settings = tiny_settings(lake, world_folder)
    config = write_settings(folder / "tiny.yaml", settings)
    done = bootstrap("run", "--config", str(config), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before = stamps(lake, *COMMITTED)
    yield FinishedCycle(
        folder=folder, lake=lake, config=config, settings=settings, output=done.stdout
    )
    assert stamps(lake, *COMMITTED) == before, "a test has changed the lake that all share"
