"""Who may ask which host, when: turns, pauses, robots.txt, and hosts that are given up.

Plain bookkeeping without threads or sockets: times come in from outside. `host_server` lets the download's processes
share one book.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from storage.intake.fetching.errors import FetchError, is_transient
from storage.intake.fetching.robots import Robots

MOST_HOSTS = 50_000
"""Hosts that are remembered; the one not asked for longest is forgotten, robots.txt and all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRules:
    """How hosts are treated."""

    agent: str
    """Name that robots.txt knows us by."""
    honour_robots: bool = True
    per_host: int = 8
    """Requests at once to one host."""
    delay_s: float = 0.0
    """Pause between the starts of two requests to one host."""
    max_crawl_delay_s: float = 10.0
    """Longest pause of a robots.txt that is kept to; a longer one is a no."""
    failures: int = 20
    """Failures in a row after which a host is given up for a while."""
    cool_down_s: float = 60.0
    """How long a host is left alone that was given up."""


@dataclass(slots=True)
class _Host:
    running: int = 0
    next_at: float = 0.0
    """Earliest start of the next request."""
    failed: int = 0
    """Failures since the last success."""
    last_failure: tuple[str, str] = ("connect", "")
    closed_until: float = 0.0
    robots: dict[str, Robots] = field(default_factory=dict)
    """By origin: scheme, host and port."""
    fetching: set[str] = field(default_factory=set)
    """Origins whose robots.txt somebody is fetching."""


@dataclass(frozen=True, slots=True)
class Go:
    """Ask now, and say `done` afterwards."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet: try again after so many seconds, or when something of the host has changed."""

    seconds: float
    is_known: bool = False
    """Whether it will be so long whatever happens."""


@dataclass(frozen=True, slots=True)
class FetchRobots:
    """Fetch the origin's robots.txt first, and say what came; you are the one who does."""

    origin: str


class HostBook:
    """The state of every host that was asked lately."""

    def __init__(self, rules: HostRules) -> None:
        self._rules = rules
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    def ask(self, url: str, now: float) -> Go | Wait | FetchRobots:
        """May this URL be asked for now? Raises FetchError when it may not be at all."""
        parts = urlsplit(url)
        host, origin = self._host(host_of(url)), f"{parts.scheme}://{parts.netloc}".lower()
        rules = self._rules
        if now < host.closed_until:
            status, reason = host.last_failure
            raise FetchError(
                status, f"{reason} (host given up after {host.failed} failures in a row)"
            )
        if rules.honour_robots:
            robots = host.robots.get(origin)
            if robots is None or robots.expires_at <= now:
                if origin in host.fetching:
                    return Wait(rules.cool_down_s)
                host.fetching.add(origin)
                return FetchRobots(origin)
            refused = robots.refusal(url, rules.agent)
            if refused is not None:
                raise FetchError("robots", refused)
        delay = max(self._delay(host, origin), rules.delay_s)
        if host.running >= (1 if delay else rules.per_host):
            return Wait(rules.cool_down_s)
        if now < host.next_at:
            return Wait(host.next_at - now, is_known=True)
        host.running += 1
        host.next_at = now + delay
        return Go()

    def done(self, url: str, error: FetchError | None, retry_after_s: float, now: float) -> None:
        """A request that was let go has ended; `error` when it gave nothing."""
        host = self._host(host_of(url))
        host.running = max(0, host.running - 1)
        if retry_after_s > 0:
            host.next_at = max(host.next_at, now + retry_after_s)
        self._count(host, error, now)

    def robots_came(self, origin: str, robots: Robots) -> None:
        """What `FetchRobots` has brought."""
        host = self._host(host_of(origin))
        host.fetching.discard(origin)
        host.robots[origin] = robots

    def robots_failed(self, origin: str, error: FetchError | None, now: float) -> None:
        """`FetchRobots` brought nothing; `error` None when whoever fetched it is gone."""
        host = self._host(host_of(origin))
        host.fetching.discard(origin)
        if error is not None:
            self._count(host, error, now)

    def _count(self, host: _Host, error: FetchError | None, now: float) -> None:
        """Note a success or a failure, and give the host up after too many in a row."""
        if error is None or not (
            error.status in ("dns", "tls") or is_transient(error.status, error.reason)
        ):
            # Also a 404: the host answers.
            host.failed = 0
            return
        host.failed += 1
        host.last_failure = (error.status, error.reason)
        if host.failed >= self._rules.failures:
            host.closed_until = now + self._rules.cool_down_s

    def _delay(self, host: _Host, origin: str) -> float:
        if not self._rules.honour_robots:
            return 0.0
        asked = host.robots[origin].delay_s(self._rules.agent)
        if asked > self._rules.max_crawl_delay_s:
            raise FetchError(
                "robots",
                f"robots.txt asks for {asked:g} s between requests, more than "
                f"{self._rules.max_crawl_delay_s:g} s",
            )
        return asked

    def _host(self, name: str) -> _Host:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host()
            if len(self._hosts) > MOST_HOSTS:
                self._forget_one()
        self._hosts.move_to_end(name)
        return host

    def _forget_one(self) -> None:
        for name, host in self._hosts.items():
            if not host.running and not host.fetching:
                del self._hosts[name]
                return


def host_of(url: str) -> str:
    """The host that a URL names, in lower case and without its port."""
    return (urlsplit(url).hostname or "").lower()
