import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "thread_waiting.py"


def test_thread_waiting_writes_a_line_per_setting_and_clock_when_quick(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    arguments = ["--quick", "--presets", "tiny", "--busy", "1", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(FILE), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(path.read_text(encoding="utf-8"))
    assert [line["name"] for line in lines] == [
        f"thread_waiting/tiny/busy_1/{setting}/{clock}_s"
        for setting in ("unset", "spin_1000")
        for clock in ("wall", "cpu")
    ]
    for line in lines:
        assert list(line) == ["name", "ours", "theirs", "ratio", "target"]
        assert 0 < line["ours"] < 60
        assert line["ratio"] == pytest.approx(line["theirs"] / line["ours"], rel=0.1)
