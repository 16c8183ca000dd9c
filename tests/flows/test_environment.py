import json
import subprocess
import sys
from pathlib import Path

import pytest
from cycle import ROOT, command_environment

SEEN = """
import json, os, sys
from flows import environment
from flows.cli import main

prepare = environment.prepare

def spy(verbose):
    loaded = [name for name in ("torch", "prefect") if name in sys.modules]
    prepare(verbose)
    print(json.dumps([loaded, os.environ["OMP_WAIT_POLICY"]]))

import flows.cli
flows.cli.prepare = spy
main(["settings", "--preset", "quickstart"])
"""


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_chose(
    given: str | None, wanted: str, tmp_path: Path
) -> None:
    environment = {k: v for k, v in command_environment().items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", SEEN],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    first = next((line for line in done.stdout.splitlines() if line.startswith("[[")), done.stderr)
    assert json.loads(first) == [[], wanted], "before torch reads it"
