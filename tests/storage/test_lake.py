import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import storage
from storage import layout
from storage.errors import CorruptData, LakeBusy, LakeNotFound, NotWritable, SchemaVersionError
from storage.lake import Lake

HOLDER = """
import sys, time
from storage.lake import Lake
with Lake.open(sys.argv[1]).lock("the first run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_open_refuses_a_folder_that_is_no_lake(tmp_path: Path) -> None:
    with pytest.raises(LakeNotFound, match="--lake"):
        Lake.open(str(tmp_path))


def test_open_finds_the_same_lake_again(lake: Lake) -> None:
    assert Lake.open(lake.uri, create=True).lake_id == lake.lake_id


def test_open_refuses_another_schema_version(lake: Lake) -> None:
    lake.root.write_bytes(layout.LAKE, json.dumps({"schema_version": 99, "lake_id": "x"}).encode())
    with pytest.raises(SchemaVersionError, match=r"99.*reads and writes 1"):
        Lake.open(lake.uri)


def test_open_names_lake_json_when_it_is_torn(lake: Lake) -> None:
    lake.root.write_bytes(layout.LAKE, b'{"schema')
    with pytest.raises(CorruptData, match=r"lake\.json"):
        Lake.open(lake.uri)


def test_lock_refuses_a_second_holder_naming_the_first(lake: Lake) -> None:
    with lake.lock("round 1"):
        with pytest.raises(LakeBusy, match=f"'round 1', process {os.getpid()}"), lake.lock("two"):
            pytest.fail("two hold the lock")
    with lake.lock("after the first"):
        pass


def test_lock_is_refused_when_read_only(lake: Lake) -> None:
    with pytest.raises(NotWritable, match="read-only"):
        with Lake.open(lake.uri, read_only=True).lock("x"):
            pytest.fail("a read-only lake was locked")


def test_lock_is_free_after_its_process_was_killed(local_lake: Lake) -> None:
    home = str(Path(storage.__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, local_lake.uri],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": home},
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LakeBusy, match="'the first run'"), local_lake.lock("second"):
            pytest.fail("two processes hold the lock")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with local_lake.lock("second"):
        pass


def test_remote_lock_passes_on_when_its_holder_stopped_renewing(tmp_path: Path) -> None:
    lake = Lake.open(f"memory://{tmp_path.name}", create=True)
    left = {"purpose": "dead", "pid": 1, "host": "h", "started_at": "t", "token": "x"}
    lake.root.write_bytes(layout.LOCK, json.dumps(left).encode())
    with pytest.raises(LakeBusy, match=r"'dead'.*it is free 600 s after"), lake.lock("next"):
        pytest.fail("a fresh lock was taken over")
    lake.root.fs.store[lake.root.path(layout.LOCK)].modified -= timedelta(seconds=700)
    with lake.lock("next"):
        pass


def test_scratch_outlives_the_lake_object(lake: Lake) -> None:
    (lake.scratch("stage", "x") / "half").write_text("done")
    assert (Lake.open(lake.uri).scratch("stage", "x") / "half").read_text() == "done"
