"""An intake in a process of its own: begun, watched, and killed at instants that nobody chose."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import storage
from storage import layout
from storage.intake import leftovers
from storage.lake import Lake

SCRIPT = """
import json, sys
from storage import DownloadConfig, Lake, UrlListConfig, ingest_urls
lake, urls, config = Lake.open(sys.argv[1]), UrlListConfig(path=sys.argv[2]), json.loads(sys.argv[3])
ingest_urls(lake, urls, DownloadConfig(**config), round=1)
"""


def start(
    lake: Lake,
    url_list: Path,
    config: Mapping[str, Any],
    stderr: IO[bytes] | None = None,
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Begin to take a list in."""
    home = str(Path(storage.__file__).parents[1])
    paths = [home, environment.pop("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, lake.uri, str(url_list), json.dumps(config)],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        stderr=stderr,
    )


def processes_of(folder: Path | str) -> list[int]:
    """Processes that download into a folder, or below it."""
    mark = f"{leftovers.OWNER}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Kills:
    """Kills a run, or a process of its img2dataset, and begins the run again, until it was enough."""

    def __init__(self, seed: int) -> None:
        self._drawn = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.resumed = 0
        """How often a run that had come to its end was made to begin again."""

    def until_enough(
        self, number: int, lake: Lake, scratch: Path, longest_s: float, *begin: Any, **env: str
    ) -> None:
        """Kill `number` times, each within `longest_s` of the last, then let it come to its end."""
        run = start(lake, *begin, **env)
        while self.killed.total() < number:
            try:
                status = run.wait(self._drawn.uniform(0.0, longest_s))
            except subprocess.TimeoutExpired:
                if self._drawn.random() < 0.5:
                    run.send_signal(signal.SIGKILL)
                    run.wait()
                    self.killed["the run"] += 1
                    run = start(lake, *begin, **env)
                elif workers := processes_of(scratch):
                    os.kill(self._drawn.choice(workers), signal.SIGKILL)
                    self.killed["a process of img2dataset"] += 1
                continue
            assert status == 0
            # What is left is to be gone on with as well.
            lake.root.remove(layout.intake_record(1, "web-00"))
            self.resumed += 1
            run = start(lake, *begin, **env)
        assert run.wait(1800) == 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {number} times" for name, number in sorted(self.killed.items()))


class MemoryWatch:
    """What a run and the processes of its img2dataset hold of memory, looked at as long as the `with` lasts."""

    def __init__(self, run: int, scratch: Path, every_s: float = 1.0) -> None:
        self._run, self._scratch, self._every_s = run, scratch, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.looks: list[tuple[int, int]] = []
        """MiB of the run, and of the largest process of img2dataset, at each look."""

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def peaks(self, first: float, last: float) -> tuple[int, int]:
        """The most of each between two shares of the time, in MiB."""
        number = len(self.looks)
        looks = self.looks[int(first * number) : max(int(last * number), 1)] or [(0, 0)]
        return max(look[0] for look in looks), max(look[1] for look in looks)

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            theirs = [_resident_mib(process) for process in processes_of(self._scratch)]
            self.looks.append((_resident_mib(self._run), max(theirs, default=0)))


def _resident_mib(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
