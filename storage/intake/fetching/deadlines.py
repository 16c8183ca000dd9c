"""Ends connections whose time is over, whatever they are at: a handshake, headers, a body that drips."""

import heapq
import itertools
import socket
import threading
import time


class Watch:
    """A connection under watch; `end` it when the connection is done with."""

    def __init__(self, connection: socket.socket) -> None:
        # A handle of its own: TLS takes the other one over.
        self._handle = connection.dup()
        self.is_late = False
        """Whether the connection was shut down."""

    def end(self) -> None:
        """Watch no longer."""
        self._handle.close()

    def shut_down(self) -> None:
        """End the connection, unless the watch has ended."""
        # First, since whoever reads from it wakes up at once.
        self.is_late = True
        try:
            self._handle.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Its watch has ended, or the other side was quicker.
            self.is_late = False
        self._handle.close()


class Deadlines:
    """One thread that shuts down what is late."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Watch]] = []
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._thread: threading.Thread | None = None

    def watch(self, connection: socket.socket, at: float) -> Watch:
        """Shut a connection down at a time of the monotonic clock, unless its watch has ended by then."""
        watch = Watch(connection)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            heapq.heappush(self._due, (at, next(self._order), watch))
            self._changed.notify()
        return watch

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    wait = self._due[0][0] - time.monotonic() if self._due else None
                    self._changed.wait(wait)
                _, _, watch = heapq.heappop(self._due)
            watch.shut_down()
