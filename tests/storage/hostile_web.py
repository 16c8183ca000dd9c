"""A web server on loopback that behaves as badly as the web does, and writes down what it was asked for."""

import functools
import gzip
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image
from web_world import jpeg

REAL, TRAP = "127.0.0.1", "127.0.0.66"
"""Where the server may be asked, and where nobody may be sent."""


@dataclass
class HostileWeb:
    """What the servers saw; `url` names a page of the real one."""

    port: int = 0
    trap_port: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    agents: set[str] = field(default_factory=set)
    trapped: list[str] = field(default_factory=list)
    robots: tuple[int, str] = (404, "")
    changed: dict[str, str] = field(default_factory=dict)
    """By number of a picture: what its site says since it has changed its mind."""
    closing: threading.Event = field(default_factory=threading.Event)

    def url(self, page: str, host: str = REAL) -> str:
        """The address of a page."""
        return f"http://{host}:{self.port}/{page}"


@functools.cache
def png_bomb() -> bytes:
    """A few hundred kilobytes that say they are 20,000 x 20,000 px."""
    data = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(data, "PNG")
    return data.getvalue()


@functools.cache
def gzip_bomb() -> bytes:
    """A hundred megabytes of zeros in a hundred kilobytes."""
    return gzip.compress(bytes(100_000_000))


@functools.cache
def animated() -> bytes:
    """A GIF of three frames."""
    frames = [Image.fromarray(np.full((48, 48), 60 * n, np.uint8)) for n in range(1, 4)]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return data.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="48" height="48"><rect width="48"/></svg>'
HTML = b"<!doctype html><title>Sorry</title>"


class _Handler(BaseHTTPRequestHandler):
    web: HostileWeb
    protocol_version = "HTTP/1.1"
    clock_is_off_s = 0.0

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = time.time() if timestamp is None else timestamp
        return super().date_time_string(now + self.clock_is_off_s)

    def do_GET(self) -> None:
        web = self.web
        web.requests[self.path] += 1
        web.agents.add(self.headers.get("User-Agent", ""))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        name = parts.path.strip("/").replace(".jpg", "").replace(".txt", "_txt")
        try:
            getattr(self, f"page_{name}", self.page_none)(query)
        except OSError:
            return  # the client has hung up, as it should
        finally:
            self.close_connection = True

    def page_none(self, query: dict[str, str]) -> None:
        self._say(404, HTML)

    def page_robots_txt(self, query: dict[str, str]) -> None:
        code, text = self.web.robots
        self._say(code, text.encode(), {"Content-Type": "text/plain"})

    def page_ok(self, query: dict[str, str]) -> None:
        number = query.get("n", "1")
        mind = self.web.changed.get(number, "")
        if mind in ("404", "410", "503"):
            self._say(int(mind), HTML)
        else:
            self._say(200, jpeg(int(number)), {"X-Robots-Tag": mind} if mind else None)

    def page_gone(self, query: dict[str, str]) -> None:
        self._say(410, HTML)

    def page_busy(self, query: dict[str, str]) -> None:
        """Says when to come again; with `days` as a date, by a clock that is so many days off."""
        wait = query.get("s", "1")
        if "days" in query:
            self.clock_is_off_s = 86_400.0 * int(query["days"])
            wait = self.date_time_string(time.time() + int(wait))
        self._say(429, b"", {"Retry-After": wait})

    def page_flaky(self, query: dict[str, str]) -> None:
        """Fails the first time."""
        first = self.web.requests[self.path] == 1
        self._say(500 if first else 200, b"" if first else jpeg(int(query["n"])))

    def page_broken(self, query: dict[str, str]) -> None:
        self._say(503, b"")

    def page_silent(self, query: dict[str, str]) -> None:
        """No byte at all."""
        self.web.closing.wait(20)

    def page_slow_headers(self, query: dict[str, str]) -> None:
        """A byte of the headers now and then, never all."""
        for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 400:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.web.closing.wait(0.1):
                return

    def page_drip(self, query: dict[str, str]) -> None:
        """The body, a byte at a time."""
        self._head(200, {"Content-Length": "100000"})
        while not self.web.closing.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def page_endless(self, query: dict[str, str]) -> None:
        self._head(200, {})
        while not self.web.closing.is_set():
            self.wfile.write(b"x" * 65536)

    def page_short(self, query: dict[str, str]) -> None:
        """Says more than it gives."""
        data = jpeg(3)
        self._head(200, {"Content-Length": str(len(data) + 500)})
        self.wfile.write(data)

    def page_reset(self, query: dict[str, str]) -> None:
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
        self.connection.close()

    def page_garbage(self, query: dict[str, str]) -> None:
        self.wfile.write(b"this is not http\r\n\r\n")

    def page_gzip(self, query: dict[str, str]) -> None:
        self._say(200, gzip_bomb(), {"Content-Encoding": "gzip"})

    def page_png_bomb(self, query: dict[str, str]) -> None:
        self._say(200, png_bomb())

    def page_html(self, query: dict[str, str]) -> None:
        self._say(200, HTML, {"Content-Type": "image/jpeg"})

    def page_svg(self, query: dict[str, str]) -> None:
        self._say(200, SVG)

    def page_animated(self, query: dict[str, str]) -> None:
        self._say(200, animated())

    def page_truncated(self, query: dict[str, str]) -> None:
        self._say(200, jpeg(4)[:900])

    def page_loop(self, query: dict[str, str]) -> None:
        self._say(302, b"", {"Location": f"/loop?n={int(query.get('n', 0)) + 1}"})

    def page_moved(self, query: dict[str, str]) -> None:
        self._say(301, b"", {"Location": f"/ok.jpg?n={query['n']}"})

    def page_to(self, query: dict[str, str]) -> None:
        self._say(302, b"", {"Location": query["where"]})

    def page_tagged(self, query: dict[str, str]) -> None:
        self._say(200, jpeg(5), {"X-Robots-Tag": query["tag"]})

    def page_tdm(self, query: dict[str, str]) -> None:
        self._say(200, jpeg(6), {"TDM-Reservation": "1"})

    def _head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for each in headers.items():
            self.send_header(*each)
        self.send_header("Connection", "close")
        self.end_headers()

    def _say(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(code, {"Content-Length": str(len(body))} | (headers or {}))
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        return


@contextmanager
def serve() -> Iterator[HostileWeb]:
    """Serve until the end of the `with`; the trap listens at another loopback address."""
    web = HostileWeb()
    # They take longer to make than a client is patient.
    png_bomb(), gzip_bomb()

    class Handler(_Handler):
        pass

    Handler.web = web

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.trapped.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(jpeg(666))

        def log_message(self, format: str, *args: object) -> None:
            return

    with _Server((REAL, 0), Handler) as server, _Server((TRAP, 0), Trap) as trap:
        web.port, web.trap_port = server.server_port, trap.server_port
        for each in (server, trap):
            threading.Thread(target=each.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield web
        finally:
            web.closing.set()
            time.sleep(0.05)
            server.shutdown()
            trap.shutdown()
