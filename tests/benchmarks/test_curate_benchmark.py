"""The benchmark of curation does the same work on both sides and writes lines in the project's form."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("curate")


def test_curate_writes_a_line_for_each_way_and_clock_when_quick(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    tiny = ["--preset", "tiny", "--image-size", "32", "--images", "6", "--shards", "2"]
    arguments = ["--quick", *tiny, "--threads", "1", "--only", "speed", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "curate.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = json.loads(path.read_text(encoding="utf-8"))
    assert [line["name"] for line in lines] == [
        f"curate/float32/{way}/{figure}"
        for way in ("one pass", "two passes")
        for figure in ("images_cpu_s", "images_wall_s", "share_waited")
    ]
    for line in lines:
        assert list(line) == ["name", "ours", "theirs", "ratio", "target"]
    for line in lines[:2]:
        assert line["ratio"] == pytest.approx(line["ours"] / line["theirs"], rel=0.01)


def test_work_that_is_not_the_same_is_refused(curate: ModuleType, tmp_path: Path) -> None:
    from blip_core import MEDConfig

    config = MEDConfig.preset("tiny", image_size_px=32)
    bench = curate.make(tmp_path, config, images=4, shard_images=2, size=(64, 48))
    options = curate.parse(["--batch-size", "2", "--workers", "1"])
    figures = {"ours": curate.ours(bench, curate.settings_of(options, "float32", 3), fused=True)}
    curate.check_equal_work(bench, 3, figures)
    with pytest.raises(SystemExit, match=r"captions of \{3\} tokens, not 4"):
        curate.check_equal_work(bench, 4, figures)
    figures["theirs"] = {"rows": 11}
    with pytest.raises(SystemExit, match="theirs wrote 11 rows"):
        curate.check_equal_work(bench, 3, figures)


def test_memory_is_that_of_a_process_of_its_own(
    curate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    original = subprocess.run

    def run(command: list[str], **how: object) -> object:
        started.append(command)
        if command[command.index("--side") + 1] == "theirs":
            return subprocess.CompletedProcess(command, 0, stdout="400.0\n")
        return original(command, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(curate.subprocess, "run", run)
    options = curate.parse(["--memory-images", "20", "30", "--threads", "1", "--workers", "1"])
    lines = curate.memory(options)
    assert len(started) == 4
    assert [line["name"] for line in lines] == [
        "curate/peak_mib/20 images",
        "curate/peak_mib/30 images",
        "curate/peak_growth",
    ]
    assert all(100 < line["ours"] < 4000 for line in lines[:2])
    assert lines[2]["ours"] == pytest.approx(lines[1]["ours"] / lines[0]["ours"], rel=0.01)
