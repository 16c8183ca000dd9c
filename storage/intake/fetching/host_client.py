"""A thread's line to the book of hosts: ask before a request, tell how it went."""

import json
import socket
import threading
from collections.abc import Callable
from io import BufferedRWPair
from typing import Any

from storage.intake.fetching.errors import FetchError


class HostClient:
    """Talks to a HostServer; each thread has a connection of its own, made when it first asks."""

    def __init__(self, address: str, on_gone: Callable[[], None] | None = None) -> None:
        """`on_gone` is called when the server is not there any more; then, or without it, ConnectionError is raised."""
        self._address, self._on_gone = address, on_gone
        self._own = threading.local()

    def ask(self, url: str) -> str | None:
        """Wait for the turn of a URL.

        None: ask the host for it now, and call `done` afterwards. An origin: fetch its robots.txt, call `robots`, and
        ask again. Raises FetchError when the URL is not to be asked for.
        """
        answer = self._say({"ask": url}, answered=True)
        if "status" in answer:
            raise FetchError(answer["status"], answer["reason"])
        return answer.get("robots")

    def done(self, url: str, error: FetchError | None, retry_after_s: float = 0.0) -> None:
        """Tell how the request for a URL ended, and for how long its host wants to be left alone, in s."""
        message: dict[str, Any] = {"done": url}
        if error is not None:
            message |= {"status": error.status, "reason": error.reason}
        if retry_after_s:
            message["retry_after"] = retry_after_s
        self._say(message)

    def robots(self, origin: str, code: int, body: bytes) -> None:
        """Tell what an origin answered for robots.txt."""
        self._say({"robots": origin, "code": code, "body": body.decode("utf-8", "replace")})

    def robots_failed(self, origin: str, error: FetchError) -> None:
        """Tell that an origin could not be asked for robots.txt."""
        self._say({"robots": origin, "status": error.status, "reason": error.reason})

    def _say(self, message: dict[str, Any], *, answered: bool = False) -> dict[str, Any]:
        line = json.dumps(message).encode() + b"\n"
        try:
            stream = self._stream()
            stream.write(line)
            stream.flush()
            answer = stream.readline() if answered else b"{}"
            if not answer:
                raise ConnectionResetError("the book of hosts was closed")
        except OSError:
            if self._on_gone is not None:
                self._on_gone()
            raise
        found: dict[str, Any] = json.loads(answer)
        return found

    def _stream(self) -> BufferedRWPair:
        stream: BufferedRWPair | None = getattr(self._own, "stream", None)
        if stream is None:
            connection = self._own.connection = socket.socket(socket.AF_UNIX)
            connection.connect(self._address)
            stream = self._own.stream = connection.makefile("rwb")
        return stream
