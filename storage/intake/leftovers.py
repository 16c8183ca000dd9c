"""Processes of a download that have outlived it: found by a marker in their environment, and ended.

Run as a file this is a guard: it waits until the process that started it is gone, and ends what that one has left. A
guard has to be there at once and weighs nothing, so nothing but the standard library is imported here.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

OWNER = "BOOTSTRAP_DOWNLOAD_FOLDER"
"""Environment variable that marks every process of a download with its folder."""

POLL_S = 0.2

LONGEST_S = 10.0
"""A process that is still there after so long cannot be killed: it waits for a device."""


def end_leftovers(folder: Path) -> None:
    """Kill processes of an earlier download into this folder, whoever started them, and wait until they are gone.

    They carry the folder in their environment, so nothing else can be hit. Elsewhere than on
    Linux this does nothing, and a process outlives its parent by one shard at most.
    """
    mark = f"{OWNER}={folder.resolve()}".encode()
    until = time.monotonic() + LONGEST_S
    # Again, for one that was just being started when its parent was killed.
    while _killed(mark) and time.monotonic() < until:
        time.sleep(0.02)


def _killed(mark: bytes) -> int:
    """Kill whoever carries a mark, but for this process; how many there were."""
    num = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                os.kill(int(entry.name), signal.SIGKILL)
                num += 1
        except (OSError, ValueError):
            continue  # ended meanwhile, or another user's
    return num


def guard(parent: int, folder: Path, temporary: Path) -> None:
    """Wait for the end of the parent, end what it has left of its download, and remove its temporary folder."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    end_leftovers(folder)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    guard(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
