"""The server acts out every fault of the URL list, as a proxy and as itself."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message

import pytest

from flows.quickstart.server import WorldServer
from flows.quickstart.world import World, WorldConfig, build_world
from storage.intake.images import inspect_image

Urls = dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(num_web=10, num_human=1, num_heldout=1)
    return build_world(config, tmp_path_factory.mktemp("served") / "world")


@pytest.fixture(scope="module")
def urls(world: World) -> Urls:
    """One URL for each fault; "" is a good one."""
    return {row["fault"]: row["url"] for row in world.truth().to_pylist() if row["url"]}


@pytest.fixture
def server(world: World) -> Iterator[WorldServer]:
    with WorldServer(world.folder, slow_seconds=30) as server:
        yield server


def _get(server: WorldServer, url: str, timeout: float = 5.0) -> tuple[bytes, Message]:
    proxy = urllib.request.ProxyHandler({"http": server.url})
    with urllib.request.build_opener(proxy).open(url, timeout=timeout) as answer:
        return answer.read(), answer.headers


@pytest.mark.parametrize("fault", ["", "duplicate", "opted_out", "tiny"])
def test_server_serves_a_jpeg_through_the_proxy(
    server: WorldServer, urls: Urls, fault: str
) -> None:
    data, headers = _get(server, urls[fault])
    assert data[:2] == b"\xff\xd8"
    assert headers["Content-Type"] == "image/jpeg"
    assert (headers["X-Robots-Tag"] is not None) == (fault == "opted_out")


@pytest.mark.parametrize(("fault", "status"), [("gone", 404), ("broken", 500)])
def test_server_answers_with_the_status_of_the_fault(
    server: WorldServer, urls: Urls, fault: str, status: int
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _get(server, urls[fault])
    assert caught.value.code == status


def test_server_calls_html_a_jpeg(server: WorldServer, urls: Urls) -> None:
    data, headers = _get(server, urls["html"])
    assert headers["Content-Type"] == "image/jpeg"
    assert data.startswith(b"<!doctype html>")


def test_server_has_half_of_a_truncated_picture(server: WorldServer, urls: Urls) -> None:
    data = _get(server, urls["truncated"])[0]
    assert inspect_image(data, 1, 10**6).status == "decode_error"


def test_server_keeps_a_slow_url_waiting(server: WorldServer, urls: Urls) -> None:
    with pytest.raises(TimeoutError):
        _get(server, urls["slow"], timeout=0.3)


def test_server_answers_plain_paths_and_counts_requests(server: WorldServer, urls: Urls) -> None:
    url = urls[""]
    with urllib.request.urlopen(f"{server.url}/{url.removeprefix('http://')}") as answer:
        assert answer.read() == _get(server, url)[0]
    assert server.counts() == {url: 2}
    with urllib.request.urlopen(f"{server.url}/__log__") as answer:
        assert json.load(answer) == {url: 2}


def test_server_does_not_know_other_hosts(server: WorldServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(server, "http://elsewhere.test/a.jpg")
