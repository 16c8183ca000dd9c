"""What the opener makes of a hostile web: one outcome each, within bounds, and no request that must not be made."""

import os
from collections.abc import Iterator
from email.message import Message
from typing import Any

import pytest
from hostile_web import REAL, TRAP, HostileWeb, serve
from web_world import jpeg

from storage.intake.fetching.errors import FetchError, parsed
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.host_server import HostServer
from storage.intake.fetching.hosts import HostRules
from storage.intake.fetching.opener import Opener, OpenerConfig
from storage.intake.fetching.opt_out import opted_out

DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "noml")


@pytest.fixture(scope="module")
def web() -> Iterator[HostileWeb]:
    with serve() as found:
        yield found


@pytest.fixture
def progress() -> Iterator[int]:
    number = os.memfd_create("progress")
    yield number
    os.close(number)


def config(**changes: Any) -> OpenerConfig:
    given = {
        "agent": "our-bot",
        "contact_url": "https://our.test/about",
        "addresses": (f"{REAL}/32",),
        "max_bytes": 2_000_000,
        "max_pixels": 10_000_000,
        "check_pixels": True,
        "deadline_s": 3.0,
        "min_bytes_per_s": 0,
        "max_redirects": 5,
        "opt_out_directives": DIRECTIVES,
        "honour_tdm": True,
    }
    return OpenerConfig(**given | changes)


def fetch(url: str, progress: int, hosts: HostClient | None = None, **changes: Any) -> bytes:
    with Opener(config(**changes), hosts, progress).open(url, timeout=2.0) as response:
        return bytes(response.read())


def test_a_picture_comes_as_it_was_served_and_one_byte_tells_of_it(
    web: HostileWeb, progress: int
) -> None:
    assert fetch(web.url("ok.jpg?n=7"), progress) == jpeg(7)
    assert fetch(web.url("moved.jpg?n=8"), progress) == jpeg(8)
    assert os.fstat(progress).st_size == 2
    assert web.agents == {"our-bot/0.1 (+https://our.test/about)"}


@pytest.mark.parametrize(
    ("page", "outcome"),
    [
        ("nothing.jpg", "http_4xx: 404 Not Found"),
        ("gone.jpg", "http_4xx: 410 Gone"),
        ("busy.jpg?s=17", "http_4xx: 429 Too Many Requests, retry after 17 s"),
        ("busy.jpg?s=17&days=-4", "http_4xx: 429 Too Many Requests, retry after 17 s"),
        ("busy.jpg?s=17&days=4", "http_4xx: 429 Too Many Requests, retry after 17 s"),
        ("broken.jpg", "http_5xx: 503 Service Unavailable"),
        ("silent.jpg", "timeout: the server was silent for too long"),
        ("slow_headers.jpg", "too_slow: not whole after 3 s"),
        ("drip.jpg", "too_slow: not whole after 3 s"),
        ("endless.jpg", "too_large: more than 2000000 bytes"),
        ("short.jpg", "connect: the answer breaks off 500 bytes early"),
        ("reset.jpg", "connect: "),
        ("garbage.jpg", "connect: BadStatusLine"),
        ("png_bomb.jpg", "too_many_pixels: more than 10000000 pixels"),
        ("loop.jpg", "http_other: more than 5 redirects"),
        ("to?where=file:///etc/passwd", "bad_url: redirected to 'file:///etc/passwd'"),
        ("to?where=ftp://127.0.0.1/a.jpg", "bad_url: redirected to 'ftp:"),
        ("tagged.jpg?tag=noai", "opted_out: X-Robots-Tag: noai"),
        ("tdm.jpg", "opted_out: tdm-reservation: 1"),
    ],
)
def test_every_fault_has_its_outcome(
    web: HostileWeb, progress: int, page: str, outcome: str
) -> None:
    with pytest.raises(FetchError) as found:
        fetch(web.url(page), progress)
    assert str(found.value).startswith(outcome)
    assert parsed(str(found.value)) == (found.value.status, found.value.reason)
    assert os.fstat(progress).st_size == 1


@pytest.mark.parametrize(
    "page", ["gzip.jpg", "html.jpg", "svg.jpg", "animated.jpg", "truncated.jpg"]
)
def test_what_only_decoding_can_judge_comes_through_as_served(
    web: HostileWeb, progress: int, page: str
) -> None:
    assert 0 < len(fetch(web.url(page), progress)) < 200_000


@pytest.mark.parametrize(
    "target",
    [
        f"http://{TRAP}:PORT/secret",
        f"http://{int.from_bytes(bytes([127, 0, 0, 66]))}:PORT/secret",
        "http://0x7f.66:PORT/secret",
        "http://[::ffff:127.0.0.66]:PORT/secret",
        f"//{TRAP}:PORT/secret",
        "http://127.0.0.%36%36:PORT/secret",
        "http://%31%32%37.0.0.66:PORT/secret",
        "http://user:word@127.0.0.66:PORT/secret",
    ],
)
def test_no_redirect_leads_to_an_address_that_is_not_allowed(
    web: HostileWeb, progress: int, target: str
) -> None:
    target = target.replace("PORT", str(web.trap_port))
    with pytest.raises(FetchError, match=r"^blocked_address: "):
        fetch(web.url(f"to?where={target}"), progress)
    with pytest.raises(FetchError, match=r"^blocked_address: "):
        fetch(target if ":" in target.partition("//")[0] else f"http:{target}", progress)
    assert web.trapped == []


def test_the_trap_would_have_been_seen(web: HostileWeb, progress: int) -> None:
    """Else the test above could not fail."""
    allowed = (f"{REAL}/32", f"{TRAP}/32")
    target = f"http://{TRAP}:{web.trap_port}/secret"
    assert fetch(web.url(f"to?where={target}"), progress, addresses=allowed) == jpeg(666)
    assert web.trapped.pop() == "/secret"


def test_a_slow_drip_is_given_up_by_its_rate_too(
    web: HostileWeb, progress: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.intake.fetching.opener.GRACE_S", 0.2)
    with pytest.raises(FetchError, match=r"^too_slow: .* bytes a second after"):
        fetch(web.url("drip.jpg"), progress, deadline_s=20.0, min_bytes_per_s=1000)


def test_pixels_are_not_judged_where_nobody_decodes(web: HostileWeb, progress: int) -> None:
    assert fetch(web.url("png_bomb.jpg"), progress, check_pixels=False)


def test_robots_txt_is_asked_for_once_and_keeps_pages_from_being_asked_for(progress: int) -> None:
    with serve() as web, HostServer(HostRules(agent="our-bot")) as server:
        web.robots = (200, "User-agent: our-bot\nDisallow: /gone.jpg\n")
        hosts = HostClient(server.address)
        assert fetch(web.url("ok.jpg?n=1"), progress, hosts) == jpeg(1)
        assert fetch(web.url("moved.jpg?n=2"), progress, hosts) == jpeg(2)
        for page in ("gone.jpg", "to?where=/gone.jpg"):
            with pytest.raises(FetchError, match=r"^robots: robots.txt disallows it for our-bot"):
                fetch(web.url(page), progress, hosts)
        assert web.requests["/robots.txt"] == 1
        assert web.requests["/gone.jpg"] == 0


@pytest.mark.parametrize(("code", "may"), [(404, True), (403, True), (500, False), (503, False)])
def test_robots_txt_that_cannot_be_had(progress: int, code: int, may: bool) -> None:
    with serve() as web, HostServer(HostRules(agent="our-bot")) as server:
        web.robots = (code, "")
        if may:
            assert fetch(web.url("ok.jpg?n=1"), progress, HostClient(server.address))
        else:
            with pytest.raises(FetchError, match=f"^robots: robots.txt answers {code}"):
                fetch(web.url("ok.jpg?n=1"), progress, HostClient(server.address))
            assert set(web.requests) == {"/robots.txt"}


def test_a_host_that_is_down_says_so_without_robots_txt(progress: int) -> None:
    with HostServer(HostRules(agent="our-bot")) as server:
        with pytest.raises(FetchError, match=r"^connect: robots.txt: ConnectionRefusedError"):
            fetch(
                f"http://{REAL}:9/a.jpg",
                progress,
                HostClient(server.address),
                addresses=(f"{REAL}/32",),
            )


@pytest.mark.parametrize(
    ("value", "is_opt_out"),
    [
        ("noai", True),
        ("NOAI, NoImageAI", True),
        ("nofollow, noml", True),
        ("none", True),
        ("all", False),
        ("otherbot: noai", False),
        ("otherbot: noindex, noai", False),
        ("our-bot: noindex", True),
        ("otherbot: noai, our-bot: noai", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("max-snippet: 5", False),
        ("noarchive", False),
        ("", False),
    ],
)
def test_robots_tags_are_read_for_our_agent(value: str, is_opt_out: bool) -> None:
    headers = Message()
    headers["X-Robots-Tag"] = value
    found = opted_out(headers, "our-bot", DIRECTIVES, honour_tdm=True)
    assert found == (f"X-Robots-Tag: {value}" if is_opt_out else None)


def test_tdm_reservation_may_be_left_to_others() -> None:
    headers = Message()
    headers["tdm-reservation"] = "1"
    assert opted_out(headers, "our-bot", DIRECTIVES, honour_tdm=True) == "tdm-reservation: 1"
    assert opted_out(headers, "our-bot", DIRECTIVES, honour_tdm=False) is None


def test_an_address_that_urllib_refuses_gives_its_turn_back(progress: int) -> None:
    class Turns:
        asked, done_with = 0, 0

        def ask(self, url: str) -> None:
            self.asked += 1

        def done(self, url: str, error: FetchError | None, retry_after_s: float = 0.0) -> None:
            assert error is not None
            self.done_with += error.status == "bad_url"

    turns = Turns()
    with pytest.raises(FetchError, match=r"^bad_url: unknown url type"):
        fetch("nonsense", progress, turns)  # type: ignore[arg-type]
    assert (turns.asked, turns.done_with) == (1, 1)
