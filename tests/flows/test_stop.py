"""Real signals: SIGTERM ends a stage at a shard's border and says which; kill -9 leaves nothing half and nobody behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cycle import (
    FinishedCycle,
    before_captioning,
    bootstrap,
    command_environment,
    file_hashes,
    write_settings,
)

from flows.settings import merge
from storage import layout

CAPTIONS = "tables/captions/round=0001"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def cycle(finished: FinishedCycle, tmp_path: Path) -> FinishedCycle:
    """A lake whose round 1 has its captioner and no captions."""
    return before_captioning(finished, tmp_path)


@pytest.fixture
def start(cycle: FinishedCycle, api_url: str) -> Iterator[Start]:
    """Start `bootstrap caption`, slowed, with some settings of the machine."""
    started: list[subprocess.Popen[str]] = []

    def begin(seconds: float = 1.0, **machine: Any) -> subprocess.Popen[str]:
        write_settings(cycle.config, merge(cycle.settings, {"machine": machine}))
        script = str(Path(__file__).with_name("slow_stage.py"))
        process = subprocess.Popen(
            [sys.executable, script, str(seconds), "caption", "--config", str(cycle.config)],
            cwd=cycle.folder,
            env=command_environment(api_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_for_first_part(cycle: FinishedCycle, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not list((cycle.lake / CAPTIONS).glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no part was committed"
        time.sleep(0.05)


def _parquet(lake: Path) -> dict[str, str]:
    return {k: v for k, v in file_hashes(lake, CAPTIONS).items() if k.endswith(".parquet")}


def _again(cycle: FinishedCycle, api_url: str) -> None:
    done = bootstrap("caption", "--config", str(cycle.config), cwd=cycle.folder, api_url=api_url)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("grace_s", [0.0, 60.0], ids=["given_up", "finished"])
def test_sigterm_ends_a_stage_at_a_shards_border_and_says_which(
    finished: FinishedCycle, cycle: FinishedCycle, api_url: str, start: Start, grace_s: float
) -> None:
    process = start(stop_grace_s=grace_s)
    _wait_for_first_part(cycle, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM, errors
    second = layout.part_name(layout.web_shards(1, 0), 1)
    wanted = f"shard {second} was " + ("finished" if grace_s else "given up after")
    assert wanted in errors.replace("\n", " ")
    committed = {path.stem for path in (cycle.lake / CAPTIONS).glob("*.json")}
    assert len(committed) == (2 if grace_s else 1)
    assert {path.stem for path in (cycle.lake / CAPTIONS).glob("*.parquet")} == committed
    assert not list(cycle.lake.rglob("_tmp-*"))
    _again(cycle, api_url)
    assert _parquet(cycle.lake) == _parquet(finished.lake)


def test_kill_leaves_no_decoding_process_and_the_same_command_the_same_bytes(
    finished: FinishedCycle, cycle: FinishedCycle, api_url: str, start: Start
) -> None:
    process = start(decode_in="processes", decode_workers=2)
    _wait_for_first_part(cycle, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("flows.decode_worker" in " ".join(child.cmdline()) for child in children)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert len(_parquet(cycle.lake)) < len(_parquet(finished.lake))
    _again(cycle, api_url)
    assert _parquet(cycle.lake) == _parquet(finished.lake)
