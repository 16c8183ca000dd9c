"""A module that runs as a process of its own and answers what it is asked, until whoever asks is gone.

For work that several cores are to share, or that may bring a process down. Started as a program and not forked, so that neither
threads nor an unguarded main module are in the way.
"""

import contextlib
import os
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class WorkerGone(Exception):
    """The process ended, or was silent for too long; what it was asked may be asked of another one."""


class WorkerProcess:
    """One process, for one thread at a time; `end` it."""

    def __init__(self, module: str, *fds: int) -> None:
        """Run a module's `main` with the number of its socket and `fds`, which it inherits; it calls `serve`."""
        ours, theirs = socket.socketpair()
        with theirs:
            given = (theirs.fileno(), *fds)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {module} import main; main{given}"],
                stdin=subprocess.DEVNULL,
                pass_fds=given,
                env=environment() | {"OMP_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, message: Any) -> None:
        """Send a message that has no answer; it is pickled. WorkerGone when it cannot be sent."""
        try:
            self._connection.send(message)
        except OSError as err:
            raise WorkerGone(str(err) or type(err).__name__) from err

    def ask(self, message: Any, silence_s: float) -> Any:
        """The answer to a message; both are pickled. WorkerGone when none comes within `silence_s`."""
        self.tell(message)
        try:
            if not self._connection.poll(silence_s):
                raise WorkerGone(f"no word for {silence_s:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError) as err:
            raise WorkerGone(str(err) or type(err).__name__) from err

    def kill(self) -> None:
        """End it now, from any thread: whoever waits for its answer gets WorkerGone."""
        self._process.kill()

    def end(self) -> int:
        """Close its socket, whereupon it ends, and wait for it; its exit status."""
        with contextlib.suppress(OSError):
            self._connection.close()
        try:
            return self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def serve(socket_fd: int, answer: Callable[[Any], Any]) -> None:
    """The other end: answer each message that comes through the socket, until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to answer; its end is ours
    connection = Connection(socket_fd)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(answer(connection.recv()))


def environment() -> dict[str, str]:
    """This process's environment, in which a Python finds this project wherever it was imported from."""
    env = dict(os.environ)
    home = str(Path(__file__).parents[1])
    if home not in site.getsitepackages():
        # Site-packages must never be put before the standard library.
        env["PYTHONPATH"] = os.pathsep.join(p for p in (home, env.get("PYTHONPATH", "")) if p)
    return env
