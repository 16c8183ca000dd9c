"""One book of hosts for all processes and threads of a download, served on a Unix socket by a thread.

A line of JSON each way. Whoever asks is answered when it may go, or when it may not: it is here that turns are waited
for. A connection that breaks gives back what it held, so that a process that dies blocks no host.
"""

import asyncio
import contextlib
import json
import logging
import tempfile
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from types import TracebackType
from typing import Any

from storage.intake.fetching.errors import FetchError
from storage.intake.fetching.hosts import FetchRobots, Go, HostBook, HostRules, host_of
from storage.intake.fetching.robots import MAX_BYTES, read_robots

logger = logging.getLogger(__name__)

LINE_BYTES = 4 * MAX_BYTES
"""Longest line: a robots.txt, escaped."""


class HostServer:
    """Serves a book of hosts while it is open; `address` is the path of its socket."""

    def __init__(self, rules: HostRules, *, patience_s: float = 30.0) -> None:
        """`patience_s` is the longest that a request waits for its turn, in s."""
        self._book = HostBook(rules)
        self._patience_s = patience_s
        # A socket's path may have some 100 characters: not below the lake's own folder.
        self._folder = tempfile.TemporaryDirectory(prefix="hosts-")
        self.address = str(Path(self._folder.name) / "book")
        self._loop = asyncio.new_event_loop()
        self._waiting: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)
        self._thread = threading.Thread(target=self._serve, name="hosts", daemon=True)
        self._ready = threading.Event()
        self._failure: OSError | None = None

    def __enter__(self) -> "HostServer":
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._failure is None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._folder.cleanup()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        try:
            server = await asyncio.start_unix_server(self._talk, self.address, limit=LINE_BYTES)
        except OSError as err:
            self._failure = err
            return
        finally:
            self._ready.set()
        await self._stop.wait()
        server.close()
        # Whoever still waits for an answer is hung up on.
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One conversation: a thread of a downloading process."""
        running: str | None = None
        robots_of: str | None = None
        try:
            while line := await reader.readline():
                message: dict[str, Any] = json.loads(line)
                if "ask" in message:
                    answer = await self._turn(message["ask"])
                    running = message["ask"] if answer.get("go") else running
                    robots_of = answer.get("robots", robots_of)
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
                elif "robots" in message:
                    self._robots(message)
                    robots_of = None
                else:
                    self._done(message)
                    running = None
        except asyncio.CancelledError:
            return  # the server ends; a task that ended as cancelled would be told as an error
        except (ConnectionError, asyncio.LimitOverrunError, ValueError) as err:
            logger.debug("a conversation about hosts broke off: %s", err)
        finally:
            if running is not None:
                self._book.done(running, None, 0.0, time.monotonic())
                self._wake(host_of(running))
            if robots_of is not None:
                self._book.robots_failed(robots_of, None, time.monotonic())
                self._wake(host_of(robots_of))
            writer.close()

    async def _turn(self, url: str) -> dict[str, Any]:
        """The answer to whoever asks for a URL, when there is one."""
        host, until = host_of(url), time.monotonic() + self._patience_s
        while True:
            now = time.monotonic()
            try:
                verdict = self._book.ask(url, now)
            except FetchError as err:
                self._wake(host)
                return {"status": err.status, "reason": err.reason}
            if isinstance(verdict, Go):
                return {"go": True}
            if isinstance(verdict, FetchRobots):
                return {"robots": verdict.origin}
            if verdict.is_known and now + verdict.seconds > until:
                # It would only hold up others until then.
                why = f"{host} wants to be left alone for another {verdict.seconds:.0f} s"
                return {"status": "too_slow", "reason": why}
            if now >= until:
                why = f"no turn at {host} within {self._patience_s:g} s"
                return {"status": "too_slow", "reason": why}
            await self._wait(host, min(verdict.seconds, until - now))

    async def _wait(self, host: str, seconds: float) -> None:
        """Until something of the host has changed, or so long."""
        turn = self._loop.create_future()
        self._waiting[host].append(turn)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(turn, max(seconds, 0.001))
        finally:
            with contextlib.suppress(ValueError):
                self._waiting[host].remove(turn)
            if not self._waiting[host]:
                del self._waiting[host]

    def _wake(self, host: str) -> None:
        for turn in self._waiting.get(host, ()):
            if not turn.done():
                turn.set_result(None)

    def _done(self, message: dict[str, Any]) -> None:
        url, status = message["done"], message.get("status")
        error = FetchError(status, message["reason"]) if status else None
        self._book.done(url, error, float(message.get("retry_after", 0.0)), time.monotonic())
        self._wake(host_of(url))

    def _robots(self, message: dict[str, Any]) -> None:
        origin, now = message["robots"], time.monotonic()
        if "code" in message:
            came = read_robots(message["code"], message["body"].encode(), now)
            self._book.robots_came(origin, came)
        else:
            error = FetchError(message["status"], message["reason"])
            self._book.robots_failed(origin, error, now)
        self._wake(host_of(origin))
