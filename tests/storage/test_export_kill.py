"""kill -9 in the middle of an export, then the same command: the bytes of an undisturbed one."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from export_world import write_lake

from storage.exports import Options, export
from storage.lake import Lake

KILLER = Path(__file__).with_name("export_killer.py")
ROOT = KILLER.parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return write_lake(str(tmp_path_factory.mktemp("exports") / "lake"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill(place: str, lake: Lake, target: Path, form: str) -> None:
    killed = subprocess.run(
        [sys.executable, str(KILLER), place, lake.uri, str(target), form],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, f"{place}: {killed.stderr[-2000:]}"


@pytest.mark.parametrize("form", ["webdataset", "hf-parquet", "coco-json"])
def test_killed_again_and_again_an_export_ends_with_the_same_bytes(
    shared: Lake, tmp_path: Path, form: str
) -> None:
    options = Options(format=form, shard_images=4)
    export(shared, str(tmp_path / "whole"), options)
    target = tmp_path / "x"
    first = None
    for place in ("picture:2", "piece:0", "picture:6", "piece:2", "card", "commit"):
        kill(place, shared, target, form)
        assert not (target / "export.json").exists(), f"{place}: committed too early"
        record = target / "_export" / "piece-00000.json"
        if record.exists():
            first = first or record.stat().st_mtime_ns
            assert record.stat().st_mtime_ns == first, f"{place}: a finished piece was made twice"
    assert first is not None
    export(shared, str(target), options)
    assert hashes(target) == hashes(tmp_path / "whole")


def test_killed_while_it_replaces_another_export_it_goes_on(shared: Lake, tmp_path: Path) -> None:
    export(shared, str(tmp_path / "x"), Options(format="blip-json"))
    kill("replace", shared, tmp_path / "x", "webdataset")
    options = Options(format="webdataset", shard_images=4)
    export(shared, str(tmp_path / "x"), options, on_stale="rebuild")
    export(shared, str(tmp_path / "whole"), options)
    assert hashes(tmp_path / "x") == hashes(tmp_path / "whole")
