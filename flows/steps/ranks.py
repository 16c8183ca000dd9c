"""One training in several processes: torchrun is started here, each of its processes is `flows.rank`.

The flow stays one process: it waits, hands progress on, and is the only one that commits. When it dies, the
ranks end themselves.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from blip_core import TrainingError

logger = logging.getLogger(__name__)

PROGRESS = "progress "
"""How a line of the first rank begins that tells how far it is."""
ERROR = "error.txt"
"""Type and message of the first error of any rank."""
HISTORY = "history.json"
NUM_LAST_LINES = 60
_RANK = re.compile(r"\brank\s*: (\d+) ")
_EXITCODE = re.compile(r"\bexitcode\s*: (-?\d+) ")
"""Lines of torchrun's summary, one after the other for each rank that failed."""
_FOLLOWS = (signal.SIGABRT, signal.SIGTERM)
"""How a rank ends because another one did: nccl gives up, torchrun asks it to."""
SECONDS_TO_END = 20


def train_in_ranks(
    job: dict[str, Any],
    folder: Path,
    *,
    processes: int,
    num_threads: int | None,
    on_progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    """Run `flows.rank` on a job in `processes` processes of this machine; returns the history.

    Raises:
        TrainingError: a process failed; holds its message, or which rank was killed.
    """
    path = folder / "job.json"
    (folder / ERROR).unlink(missing_ok=True)
    path.write_text(json.dumps(job | {"parent": os.getpid()}), encoding="utf-8")
    threads = num_threads or max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "flows.rank", str(path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    last: deque[str] = deque(maxlen=NUM_LAST_LINES)
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=_keep_last, args=(process.stderr, last), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            if line.startswith(PROGRESS):
                on_progress(*json.loads(line.removeprefix(PROGRESS)))
        status = process.wait()
    finally:
        _end(process)
    reader.join(timeout=SECONDS_TO_END)
    if status != 0:
        error = folder / ERROR
        told = error.read_text(encoding="utf-8") if error.is_file() else ""
        reason = _killed(last) or told or "\n".join(last)
        raise TrainingError(f"training in {processes} processes failed: {reason}")
    history: list[dict[str, Any]] = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    return history


def _killed(lines: Sequence[str]) -> str:
    """Which ranks a signal has ended, by what torchrun says; empty when none."""
    found, rank = [], ""
    for line in lines:
        if match := _RANK.search(line):
            rank = match[1]
        elif (match := _EXITCODE.search(line)) and int(match[1]) < 0:
            number = -int(match[1])
            if number not in _FOLLOWS:
                found.append(f"rank {rank} was ended by {signal.Signals(number).name}")
    if not found:
        return ""
    return (
        f"{' and '.join(found)}: somebody ended it, or the system did, for want of memory (then lower "
        "batch_size or machine.train_processes); the others have ended too, and the same command goes on from "
        "the last checkpoint"
    )


def _keep_last(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip())
        logger.info("%s", line.rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun then ends its processes
        try:
            process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
