"""Serves the world's web pictures on this machine, as a web server and as a forward proxy.

URLs of the world name hosts that do not exist (shop.shapes.test), so that they are the same on every
machine and in every run; a client reaches them by using this server as its http proxy. Faults of the
URL list (gone, slow, not an image, ...) are acted out here.
"""

import io
import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from PIL import Image

from flows.quickstart.world import load_world

logger = logging.getLogger(__name__)

LOG_PATH = "/__log__"
HTML = b"<!doctype html><title>Moved</title><p>This picture is not here any more."


class WorldServer:
    """Answers GETs for the world's URLs from a thread of this process; use it in a `with`.

    `url` is both the server's own address and the `http_proxy` value that reaches the world's hosts.
    Slow URLs answer after `slow_seconds`: let it exceed the download's timeout.
    Counts requests per URL: `counts()` here, `GET /__log__` (JSON) from elsewhere.
    """

    def __init__(self, folder: Path, *, port: int = 0, slow_seconds: float = 6.0) -> None:
        world = load_world(folder)
        served = [row for row in world.truth().to_pylist() if row["url"]]
        # A duplicate row repeats its original's URL: the original decides what is served.
        files = {row["url"]: row for row in served if row["fault"] != "duplicate"}
        self._http = _Server(
            ("127.0.0.1", port), folder, {url: row["image_file"] for url, row in files.items()}
        )
        self._http.slow_seconds = slow_seconds
        self._http.faults = {url: row["fault"] for url, row in files.items() if row["fault"]}
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )

    @property
    def url(self) -> str:
        """Address of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def counts(self) -> dict[str, int]:
        """How often each URL was asked for."""
        return self._http.snapshot()

    def __enter__(self) -> "WorldServer":
        self._thread.start()
        logger.info("the world is served at %s", self.url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # slow answers must not hold up the end
    request_queue_size = 256  # the default of 5 resets connections of a parallel downloader

    def __init__(self, address: tuple[str, int], folder: Path, files: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self.files = files
        self.faults: Mapping[str, str] = {}
        self.slow_seconds = 0.0
        self.closing = threading.Event()
        self._requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def count(self, url: str) -> None:
        with self._lock:
            self._requests[url] += 1

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._requests.items()))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up (a timeout, a kill) is no event here."""
        logger.debug("a client hung up", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if urlsplit(self.path).path == LOG_PATH:
            self._answer(200, "application/json", json.dumps(self.server.snapshot()).encode())
            return
        url = self._asked_url()
        self.server.count(url)
        if url not in self.server.files:
            self._answer(404, "text/html", HTML)
            return
        data = (self.server.folder / self.server.files[url]).read_bytes()
        self._act(self.server.faults.get(url, ""), data)

    def _asked_url(self) -> str:
        """The URL meant: a proxy's absolute one, else by Host header, else /host/path."""
        if self.path.startswith("http://"):
            return self.path
        host = self.headers.get("Host", "").partition(":")[0]
        if host.endswith(".shapes.test"):
            return f"http://{host}{self.path}"
        return f"http:/{self.path}"

    def _act(self, fault: str, data: bytes) -> None:
        """Answer as the URL's fault demands; "" serves the picture."""
        if fault == "gone":
            self._answer(404, "text/html", HTML)
        elif fault == "broken":
            self._answer(500, "text/plain", b"the database is down")
        elif fault == "html":
            self._answer(200, "image/jpeg", HTML)
        elif fault == "truncated":
            self._answer(200, "image/jpeg", data[: len(data) // 2])
        elif fault == "opted_out":
            self._answer(200, "image/jpeg", data, robots="noai, noimageai")
        elif fault == "tiny":
            self._answer(200, "image/jpeg", _shrunk(data))
        else:
            if fault == "slow":
                self.server.closing.wait(self.server.slow_seconds)
            self._answer(200, "image/jpeg", data)

    def _answer(self, status: int, kind: str, body: bytes, *, robots: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if robots:
            self.send_header("X-Robots-Tag", robots)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


def _shrunk(data: bytes) -> bytes:
    """The picture as a tracking pixel."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((1, 1)).save(buffer, "JPEG")
    return buffer.getvalue()
