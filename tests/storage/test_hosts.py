"""Turns at hosts, robots.txt, and hosts that are given up: the book alone, then as processes share it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.intake.fetching.errors import FetchError
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.host_server import HostServer
from storage.intake.fetching.hosts import FetchRobots, Go, HostBook, HostRules, Wait
from storage.intake.fetching.robots import read_robots

URL = "http://Pictures.test/a.jpg"
DEAD = FetchError("connect", "refused")


def _book(**changes: object) -> HostBook:
    return HostBook(HostRules(agent="our-bot", **({"honour_robots": False} | changes)))  # type: ignore[arg-type]


def _with_robots(text: str, code: int = 200, **changes: object) -> HostBook:
    book = _book(honour_robots=True, **changes)
    assert book.ask(URL, 0.0) == FetchRobots("http://pictures.test")
    book.robots_came("http://pictures.test", read_robots(code, text.encode(), 0.0))
    return book


def test_a_host_gives_so_many_turns_at_once_and_others_are_none_the_worse() -> None:
    book = _book(per_host=2)
    assert [book.ask(URL, 0.0), book.ask(URL, 0.0)] == [Go(), Go()]
    assert isinstance(book.ask(URL, 0.0), Wait)
    assert book.ask("http://other.test/a.jpg", 0.0) == Go()
    book.done(URL, None, 0.0, 1.0)
    assert book.ask(URL, 1.0) == Go()


def test_starts_keep_the_pause_between_them() -> None:
    book = _book(delay_s=2.0)
    assert book.ask(URL, 0.0) == Go()
    book.done(URL, None, 0.0, 0.5)
    assert book.ask(URL, 0.5) == Wait(1.5, is_known=True)
    assert book.ask(URL, 2.0) == Go()


def test_retry_after_leaves_the_host_alone() -> None:
    book = _book()
    assert book.ask(URL, 0.0) == Go()
    book.done(URL, FetchError("http_4xx", "429 Too Many Requests"), 30.0, 1.0)
    assert book.ask(URL, 2.0) == Wait(29.0, is_known=True)
    assert book.ask(URL, 31.0) == Go()


def test_a_host_that_only_fails_is_given_up_and_tried_again_once_it_has_cooled_down() -> None:
    book = _book(failures=3, cool_down_s=60.0)
    for _ in range(3):
        assert book.ask(URL, 0.0) == Go()
        book.done(URL, DEAD, 0.0, 0.0)
    with pytest.raises(FetchError, match=r"connect: refused .*given up after 3 failures"):
        book.ask(URL, 59.0)
    assert book.ask(URL, 61.0) == Go()
    book.done(URL, DEAD, 0.0, 61.0)
    with pytest.raises(FetchError):
        book.ask(URL, 62.0)
    assert book.ask(URL, 200.0) == Go()
    book.done(URL, FetchError("http_4xx", "404 Not Found"), 0.0, 200.0)
    for _ in range(2):
        book.done(URL, DEAD, 0.0, 201.0)
    assert book.ask(URL, 202.0) == Go()


def test_robots_txt_is_asked_for_once_and_kept_to() -> None:
    book = _book(honour_robots=True)
    assert book.ask(URL, 0.0) == FetchRobots("http://pictures.test")
    assert isinstance(book.ask(URL, 0.0), Wait)
    text = b"User-agent: *\nDisallow: /private/*.jpg$\nAllow: /\n"
    book.robots_came("http://pictures.test", read_robots(200, text, 0.0))
    assert book.ask(URL, 1.0) == Go()
    with pytest.raises(FetchError, match=r"^robots: robots.txt disallows it for our-bot"):
        book.ask("http://pictures.test/private/a.jpg", 1.0)
    assert book.ask("https://pictures.test/a.jpg", 1.0) == FetchRobots("https://pictures.test")
    assert book.ask(URL, 90_000.0) == FetchRobots("http://pictures.test")


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("User-agent: our-bot\nDisallow: /\n", False),
        ("User-agent: other\nDisallow: /\n", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: our-bot\nDisallow:\n", True),
        ("", True),
        ("<html>no robots here</html>", True),
    ],
)
def test_robots_txt_speaks_to_our_agent(text: str, may: bool) -> None:
    book = _with_robots(text)
    if may:
        assert book.ask(URL, 1.0) == Go()
    else:
        with pytest.raises(FetchError, match=r"^robots: "):
            book.ask(URL, 1.0)


def test_a_missing_robots_txt_allows_all_and_a_broken_one_nothing_for_a_while() -> None:
    assert _with_robots("", 404).ask(URL, 1.0) == Go()
    broken = _with_robots("", 503)
    with pytest.raises(FetchError, match=r"^robots: robots.txt answers 503"):
        broken.ask(URL, 1.0)
    assert broken.ask(URL, 400.0) == FetchRobots("http://pictures.test")


def test_crawl_delay_is_kept_to_one_request_at_a_time() -> None:
    book = _with_robots("User-agent: *\nCrawl-delay: 3\n")
    assert book.ask(URL, 1.0) == Go()
    assert isinstance(book.ask(URL, 1.5), Wait)
    book.done(URL, None, 0.0, 2.0)
    assert book.ask(URL, 2.0) == Wait(2.0, is_known=True)
    long = _with_robots("User-agent: *\nCrawl-delay: 600\n")
    with pytest.raises(FetchError, match=r"^robots: .*600 s between requests, more than 10 s"):
        long.ask(URL, 1.0)


def test_processes_share_turns() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def ask_once(client: HostClient, number: int) -> None:
        nonlocal running, most
        assert client.ask(f"http://pictures.test/{number}.jpg") is None
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        client.done(f"http://pictures.test/{number}.jpg", None)

    rules = HostRules(agent="our-bot", honour_robots=False, per_host=3)
    with HostServer(rules) as server, ThreadPoolExecutor(16) as pool:
        clients = [HostClient(server.address) for _ in range(2)]
        list(pool.map(lambda n: ask_once(clients[n % 2], n), range(60)))
    assert most == 3


def test_whoever_waits_too_long_is_sent_away_and_a_dead_one_gives_its_turn_back() -> None:
    rules = HostRules(agent="our-bot", honour_robots=False, per_host=1)
    with HostServer(rules, patience_s=0.3) as server:
        first, second = HostClient(server.address), HostClient(server.address)
        assert first.ask(URL) is None
        with pytest.raises(FetchError, match=r"^too_slow: no turn at pictures.test within 0.3 s"):
            second.ask(URL)
        # As the end of its process would.
        first._stream().close()
        first._own.connection.close()
        assert second.ask(URL) is None


def test_robots_txt_is_fetched_by_one_and_again_when_that_one_dies() -> None:
    with HostServer(HostRules(agent="our-bot")) as server, ThreadPoolExecutor(2) as pool:
        first, second = HostClient(server.address), HostClient(server.address)
        assert first.ask(URL) == "http://pictures.test"
        waiting = pool.submit(second.ask, URL)
        time.sleep(0.1)
        assert not waiting.done()
        first._stream().close()
        first._own.connection.close()
        assert waiting.result(5) == "http://pictures.test"
        pool.submit(
            second.robots, "http://pictures.test", 200, b"User-agent: *\nDisallow: /\n"
        ).result(5)


def test_a_known_long_wait_is_not_waited_for() -> None:
    rules = HostRules(agent="our-bot", honour_robots=False)
    with HostServer(rules, patience_s=5.0) as server:
        client = HostClient(server.address)
        assert client.ask(URL) is None
        client.done(URL, FetchError("http_4xx", "429 Too Many Requests"), 120.0)
        with pytest.raises(FetchError, match=r"left alone for another 1[12][0-9] s"):
            client.ask(URL)


def test_whoever_asks_when_the_book_is_gone_is_told_first() -> None:
    told = []
    with HostServer(HostRules(agent="our-bot", honour_robots=False)) as server:
        client = HostClient(server.address, on_gone=lambda: told.append(True))
        assert client.ask(URL) is None
    with pytest.raises(ConnectionError):
        client.ask("http://other.test/a.jpg")
    assert told
