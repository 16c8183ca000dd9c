"""The benchmark of SQL runs whole on a small lake, and both sides keep the same texts."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_sql_benchmark_measures_every_question_on_a_small_lake(tmp_path: Path) -> None:
    out = tmp_path / "sql.json"
    arguments = ["--quick", "--policies", "blip,percentile", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "benchmarks/sql.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name in ("sweep", "decide:blip", "decide:percentile", "pandas"):
        sides = found[name]["ours"], found[name]["theirs"]
        assert all(side["wall_s"] > 0 and side["peak_mb"] > 0 for side in sides), found[name]
    for policy in ("blip", "percentile"):
        ours, theirs = (found[f"decide:{policy}"][side]["kept"] for side in ("ours", "theirs"))
        assert ours == theirs > 0
    assert found["pandas"]["theirs"]["kept"] == found["decide:blip"]["ours"]["kept"]
    assert found["funnel"]["rows"] > 5
    assert found["why"]["image_s"] > 0
