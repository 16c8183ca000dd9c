import os
import subprocess
from pathlib import Path

import pytest

from storage.errors import ConfigError, NotWritable, StorageFull
from storage.fs import Root
from storage.lake import Lake


def test_root_reads_back_what_it_wrote_when_local_or_remote(lake: Lake) -> None:
    lake.root.write_bytes("a/b.bin", b"0123456789")
    assert lake.root.read_bytes("a/b.bin") == b"0123456789"
    assert lake.root.read_range("a/b.bin", 2, 3) == b"234"
    assert lake.root.read_range("a/b.bin", 8, 10) == b"89"
    assert lake.root.size("a/b.bin") == 10
    assert lake.root.list("a") == ["b.bin"]
    assert lake.root.list("nowhere") == []


def test_root_shows_no_unfinished_write_and_sweeps_it(lake: Lake) -> None:
    lake.root.write_bytes("a/whole", b"x")
    lake.root.write_bytes("a/_tmp-123-half", b"x")
    assert lake.root.list("a") == ["whole"]
    assert lake.root.list_recursive("a") == ["a/whole"]
    assert lake.root.sweep("a") == 1
    assert not lake.root.exists("a/_tmp-123-half")


def test_root_keeps_the_old_file_when_a_write_fails(local_lake: Lake) -> None:
    local_lake.root.write_bytes("a", b"old")
    with pytest.raises(FileNotFoundError), local_lake.root.staged("a") as tmp:
        tmp.with_name("elsewhere").replace(tmp)
    assert local_lake.root.read_bytes("a") == b"old"
    assert local_lake.root.sweep("") == 0


def test_root_refuses_a_path_that_leaves_it(lake: Lake) -> None:
    with pytest.raises(ConfigError, match="leaves the lake"):
        lake.root.read_bytes("../secret")


def test_root_names_the_extra_when_the_protocol_is_unknown() -> None:
    with pytest.raises(ConfigError, match="nosuch://x"):
        Root("nosuch://x")


def test_root_says_storage_full_when_the_disk_is(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        lake = Lake.open(str(tmp_path), create=True)
        with pytest.raises(StorageFull, match=r"tables/x.*free some space"):
            lake.root.write_bytes("tables/x", b"0" * 1_000_000)
        assert lake.root.list("tables") == []
        lake.root.write_bytes("tables/x", b"fits")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_root_says_not_writable_without_the_right(tmp_path: Path) -> None:
    # Root may write anywhere but here; others may not write into a folder without the bit.
    target = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "closed"
    if os.geteuid() != 0:
        target.mkdir(mode=0o500)
    with pytest.raises(NotWritable, match="give this user the right"):
        Lake.open(str(target / "lake"), create=True)
