"""Several processes share the shards of a stage: each shard once, whoever dies, and the same bytes."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
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

from flows import models
from flows.curators import Curators
from flows.errors import Stopped, WorkerDied
from flows.session import Run
from flows.settings import merge, parse_settings
from flows.steps.curate_shards import Tally
from flows.steps.shard_jobs import ShardDone
from flows.steps.shards import web_parts
from flows.stopping import Stop
from storage import CorruptShard, Lake, LakeBusy, layout, list_parts

TABLES = ("tables/captions/round=0001", "tables/scores/round=0001")
SLOW = """
import sys
if "flows.curator" in sys.orig_argv:
    import os, signal, time
    from blip_core import MEDCaptioner
    original = MEDCaptioner.caption
    def caption(*arguments):
        {}
        return original(*arguments)
    MEDCaptioner.caption = caption
"""
"""A sitecustomize.py: the processes are the real ones, only their captioner takes its time, or their life."""


@pytest.fixture
def cycle(finished: FinishedCycle, tmp_path: Path) -> FinishedCycle:
    """A lake whose round 1 has its models, and neither captions nor scores of its own."""
    return before_captioning(finished, tmp_path)


def _slowed(folder: Path, monkeypatch: pytest.MonkeyPatch, before_each: str) -> str:
    """Let the processes do something before each batch; returns the PYTHONPATH that does it."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SLOW.format(before_each), encoding="utf-8")
    path = os.pathsep.join([str(folder / "site"), command_environment()["PYTHONPATH"]])
    monkeypatch.setenv("PYTHONPATH", path)
    return path


class Watching(Tally):
    """Notes what each process does, and lets a test act on it."""

    def __init__(self) -> None:
        super().__init__(100, lambda done, total, note: None)
        self.done: list[str] = []
        self.begun_again: list[str] = []
        self.on_images: Any = None

    def images(self, pairs: Any, count: int) -> None:
        super().images(pairs, count)
        if self.on_images is not None:
            self.on_images(pairs.name)

    def shard(self, done: ShardDone) -> None:
        super().shard(done)
        self.done.append(done.pairs.name)

    def give_back(self, pairs: Any) -> None:
        super().give_back(pairs)
        self.begun_again.append(pairs.name)


def _run(cycle: FinishedCycle, **machine: Any) -> Run:
    changes = {"machine": {"curate_processes": 2} | machine}
    return Run(Lake.open(str(cycle.lake)), parse_settings(merge(cycle.settings, changes)), 1)


def _curators(run: Run, tally: Tally, stop: Stop | None = None, *, fused: bool = False) -> Curators:
    captioner, scorer = (models.require(run, role, 1) for role in ("captioner", "filter"))
    return Curators(run, captioner, scorer if fused else None, tally, stop or Stop())


def _parquet(lake: Path, *tables: str) -> dict[str, str]:
    return {k: v for k, v in file_hashes(lake, *tables).items() if k.endswith(".parquet")}


def _processes(parent: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if "flows.curator" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_two_processes_make_the_bytes_of_one_and_each_shard_once(
    finished: FinishedCycle, cycle: FinishedCycle
) -> None:
    run, tally = _run(cycle, num_threads=2, decode_workers=4), Watching()
    threads: set[str] = set()

    def look(name: str) -> None:
        threads.update(process.environ()["OMP_NUM_THREADS"] for process in _processes())

    tally.on_images = look
    _curators(run, tally, fused=True).run_shards(web_parts(run))
    assert threads == {"1"}, "each has its share"
    assert sorted(tally.done) == [part.name for part in web_parts(run)]
    assert tally.curated.built == 2 * len(tally.done)
    assert _parquet(cycle.lake, *TABLES) == _parquet(finished.lake, *TABLES)
    assert _processes() == []


def test_killed_process_gives_its_shards_back(
    finished: FinishedCycle,
    cycle: FinishedCycle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _slowed(tmp_path, monkeypatch, "time.sleep(1.0)")
    run, tally, killed = _run(cycle), Watching(), []

    def kill(name: str) -> None:
        if not killed:
            killed.extend(_processes())
            for process in killed:
                process.kill()

    tally.on_images = kill
    _curators(run, tally).run_shards(web_parts(run))
    assert killed
    assert tally.begun_again
    assert Counter(tally.done) == Counter(part.name for part in web_parts(run))
    assert _parquet(cycle.lake, TABLES[0]) == _parquet(finished.lake, TABLES[0])


def test_processes_that_keep_dying_end_the_stage_with_their_last_words(
    cycle: FinishedCycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "sys.stderr.write('no memory left\\n'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    _slowed(tmp_path, monkeypatch, words)
    run = _run(cycle)
    with pytest.raises(WorkerDied, match=r"3 processes died in a row.*status -9: .*no memory left"):
        _curators(run, Watching()).run_shards(web_parts(run))
    assert _processes() == []
    assert list_parts(run.lake, "captions", 1) == []


def test_error_of_a_process_is_raised_where_the_flow_runs(cycle: FinishedCycle) -> None:
    run = _run(cycle)
    shard = web_parts(run)[1].name
    (cycle.lake / layout.shard(shard)).unlink()
    with pytest.raises(CorruptShard, match=rf"{shard}\.tar is gone"):
        _curators(run, Watching()).run_shards(web_parts(run))
    assert _processes() == []


def test_stop_is_handed_on_and_every_process_says_what_became_of_its_shard(
    cycle: FinishedCycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slowed(tmp_path, monkeypatch, "time.sleep(1.0)")
    run, tally, stop = _run(cycle, stop_grace_s=0.0), Watching(), Stop()
    seen: set[str] = set()

    def ask(name: str) -> None:
        seen.add(name)
        if len(seen) == 2:
            stop.ask()

    tally.on_images = ask
    with pytest.raises(Stopped) as caught:
        _curators(run, tally, stop).run_shards(web_parts(run))
    assert "stopped as asked: shard web-" in str(caught.value)
    committed = {part.name for part in list_parts(run.lake, "captions", 1)}
    assert committed == set(tally.done)
    for name in seen - committed:
        assert f"shard {name} was given up after" in str(caught.value)
    assert _processes() == []


def test_killed_flow_takes_its_processes_along_and_the_same_command_ends_the_work(
    finished: FinishedCycle,
    cycle: FinishedCycle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    api_url: str,
) -> None:
    path = _slowed(tmp_path, monkeypatch, "time.sleep(1.0)")
    settings = merge(cycle.settings, {"machine": {"curate_processes": 2}})
    write_settings(cycle.config, settings)
    command = [sys.executable, "-m", "flows.cli", "caption", "--config", str(cycle.config)]
    flow = subprocess.Popen(
        command,
        cwd=cycle.folder,
        env=command_environment(api_url) | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not list((cycle.lake / TABLES[0]).glob("*.json")):
        assert flow.poll() is None
        assert time.monotonic() < until, "no part was committed"
        time.sleep(0.05)
    processes = _processes(flow.pid)
    assert len(processes) == 2
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    done = bootstrap("caption", "--config", str(cycle.config), cwd=cycle.folder, api_url=api_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _parquet(cycle.lake, TABLES[0]) == _parquet(finished.lake, TABLES[0])


def test_lock_is_held_until_the_last_process_that_shares_it_is_gone(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "from storage import Lake\n"
        "lake = Lake.open(sys.argv[1], create=True)\n"
        "with lake.lock('parent'):\n"
        "    code = 'import sys; sys.stdin.read()'\n"
        "    child = subprocess.Popen([sys.executable, '-c', code], pass_fds=(lake.lock_fd,))\n"
        "    sys.stdout.write('up\\n'); sys.stdout.flush()\n"
        "    child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lake")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    os.waitpid(parent.pid, 0)
    lake = Lake.open(str(tmp_path / "lake"))
    with pytest.raises(LakeBusy, match="'parent'"), lake.lock("another"):
        pass
    child.kill()
    psutil.wait_procs([child], timeout=10)
    with lake.lock("another"):
        assert lake.lock_fd is not None
    assert lake.lock_fd is None
