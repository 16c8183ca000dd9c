"""A real lake, a real HTTP server with good and bad pictures, and one shared real download."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from web_world import (
    WEB_ROWS,
    PictureServer,
    WebLake,
    answer,
    download_config,
    write_list,
)

from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls
from storage.lake import Lake


@pytest.fixture(scope="session")
def pictures() -> Iterator[PictureServer]:
    state = PictureServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests[self.path] += 1
            name = self.path.rpartition("/")[2]
            time.sleep(4.0 if name.startswith("slow") else state.delay_s)
            if name.startswith("held"):
                state.released.wait(60)
            code, body, headers = answer(name)
            try:
                self.send_response(code)
                for header in headers.items():
                    self.send_header(*header)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                return  # the client has hung up, as it should on slow and huge

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


@pytest.fixture(scope="session")
def web_lake(tmp_path_factory: pytest.TempPathFactory, pictures: PictureServer) -> WebLake:
    folder = tmp_path_factory.mktemp("web")
    rows = [*WEB_ROWS, ("file:///etc/hostname", "not of the web"), ("http://", "no host")]
    url_list = UrlListConfig(path=str(write_list(folder / "urls.parquet", rows)))
    lake = Lake.open(str(folder / "lake"), create=True)
    config = download_config(pictures)
    progress: list[tuple[int, int]] = []
    parts = ingest_urls(
        lake, url_list, config, round=1, on_progress=lambda *done: progress.append(done)
    )
    return WebLake(lake, url_list, config, parts, progress)


@pytest.fixture(params=["local", "memory"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Lake:
    """An empty lake, on a disk and in memory."""
    uri = str(tmp_path / "lake") if request.param == "local" else f"memory://{tmp_path.name}"
    return Lake.open(uri, create=True)


@pytest.fixture
def local_lake(tmp_path: Path) -> Lake:
    return Lake.open(str(tmp_path / "lake"), create=True)
