"""urllib's opener as img2dataset's workers use it: checked addresses, bounded answers, polite to hosts.

img2dataset calls `urllib.request.urlopen(...).read()` and keeps the text of whatever is raised. So all that it cannot
be told stands here, and every failure is a FetchError whose text begins with its outcome.
"""

import functools
import http.client
import io
import math
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

from storage.intake.fetching.addresses import AddressRules, address_rules
from storage.intake.fetching.deadlines import Deadlines, Watch
from storage.intake.fetching.errors import FetchError
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.opt_out import opted_out
from storage.intake.fetching.robots import MAX_BYTES as ROBOTS_BYTES

_BLOCK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_ENOUGH_FOR_SIZE = 1 << 10
"""Bytes after which most formats have told their width and height."""
MOST_ROBOTS_REDIRECTS = 5
"""As many as RFC 9309 asks to follow."""
GRACE_S = 5.0
"""A response may take so long before its rate counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenerConfig:
    """Bounds on a request, and what is honoured."""

    agent: str
    contact_url: str | None
    addresses: tuple[str, ...]
    """Networks that are reached although they are not public."""
    max_bytes: int
    max_pixels: int
    check_pixels: bool
    """Judge width and height before img2dataset decodes the image."""
    deadline_s: float
    min_bytes_per_s: int
    max_redirects: int
    opt_out_directives: tuple[str, ...]
    honour_tdm: bool
    proxy: str | None = None
    """Proxy for all requests; None takes the environment's."""

    @property
    def user_agent(self) -> str:
        """The whole header: who asks, and where to complain."""
        contact = f" (+{self.contact_url})" if self.contact_url else ""
        return f"{self.agent}/0.1{contact}"


class _Request(urllib.request.Request):
    """A request with the time at which it has to be over, and its watch once it is connected."""

    def __init__(self, url: str, agent: str, deadline: float) -> None:
        super().__init__(url, headers={"User-Agent": agent})
        self.own_host: str = self.host
        """Host and port as urllib understands them, before a proxy takes their place."""
        self.deadline = deadline
        self.watch: Watch | None = None

    @property
    def own_name(self) -> str:
        """The host without its port."""
        return urlsplit(f"//{self.own_host}").hostname or ""

    @property
    def is_proxied(self) -> bool:
        """Whether the connection goes to a proxy."""
        return self.host != self.own_host

    @property
    def is_late(self) -> bool:
        """Whether the connection was shut down because its time was over."""
        return self.watch is not None and self.watch.is_late

    def end_watch(self) -> None:
        """Watch the connection no longer."""
        if self.watch is not None:
            self.watch.end()


class Opener(urllib.request.OpenerDirector):
    """Opens http and https addresses alone, under an OpenerConfig; installed with urllib's `install_opener`."""

    def __init__(self, config: OpenerConfig, hosts: HostClient | None, progress: int) -> None:
        """`progress` is a file descriptor that gets one byte for each request that ends."""
        super().__init__()
        self._config, self._hosts, self._progress = config, hosts, progress
        self._addresses = address_rules(config.addresses)
        for handler in (
            urllib.request.ProxyHandler(
                None if config.proxy is None else dict.fromkeys(("http", "https"), config.proxy)
            ),
            urllib.request.UnknownHandler(),
            _Http(self._addresses),
            _Https(self._addresses),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self.add_handler(handler)

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """The answer for a URL, its redirects followed; `read()` of it is bounded. Raises FetchError."""
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        try:
            return self._follow(url, timeout)
        finally:
            # The supervisor watches the file grow.
            os.write(self._progress, b".")

    def look(self, url: str, timeout: float) -> None:
        """Ask for a URL, and hang up when its headers are there. Raises FetchError for what an image must not be kept after."""
        response = self._follow(url, timeout)
        response.close()
        response.hang_up()

    def _follow(self, url: str, timeout: float) -> Any:
        deadline = time.monotonic() + self._config.deadline_s
        for _ in range(self._config.max_redirects + 1):
            self._wait_for_turn(url, timeout)
            # Waiting for a turn is no fault of the server's.
            deadline = max(deadline, time.monotonic() + timeout)
            answer = self._visit(url, timeout, deadline)
            if not isinstance(answer, str):
                return answer
            url = answer
        raise FetchError("http_other", f"more than {self._config.max_redirects} redirects")

    def _visit(self, url: str, timeout: float, deadline: float) -> Any:
        """The answer of one request whose turn it is, or the URL that it redirects to."""
        try:
            request = _Request(url, self._config.user_agent, deadline)
        except ValueError as err:  # urllib refuses the address itself; the turn is given back
            refused = FetchError("bad_url", str(err))
            if self._hosts is not None:
                self._hosts.done(url, refused)
            raise refused from err
        try:
            self._addresses.check_literal(request.own_name)
            response = super().open(request, timeout=timeout)
        except urllib.error.HTTPError as err:
            target = err.headers.get("Location") if err.code in _REDIRECTS else None
            failed = None if target else _http_error(err)
            err.close()
            self._done(url, request, failed, _retry_after_s(err.headers))
            if failed is not None:
                raise failed from err
            return _target(url, str(target))
        except Exception as err:
            error = self._named(err, request)
            self._done(url, request, error)
            raise error from err
        evidence = opted_out(
            response.headers,
            self._config.agent,
            self._config.opt_out_directives,
            honour_tdm=self._config.honour_tdm,
        )
        if evidence is not None:
            response.close()
            self._done(url, request, None)
            raise FetchError("opted_out", evidence)
        response.read = functools.partial(self._read, url, request, response)
        response.hang_up = functools.partial(self._done, url, request, None)
        return response

    def _read(self, url: str, request: _Request, response: Any) -> bytes:
        """The whole body; what img2dataset calls in place of the response's own `read`."""
        error: FetchError | None = None
        try:
            body = self._body(response)
            if request.is_late:
                raise TimeoutError
            return body
        except Exception as err:
            error = self._named(err, request)
            raise error from err
        finally:
            self._done(url, request, error)

    def _body(self, response: Any) -> bytes:
        config, began = self._config, time.monotonic()
        body = io.BytesIO()
        is_judged = not config.check_pixels
        while block := response.read1(_BLOCK):
            body.write(block)
            held = body.tell()
            if held > config.max_bytes:
                raise FetchError("too_large", f"more than {config.max_bytes} bytes")
            took = time.monotonic() - began
            if took > GRACE_S and held / took < config.min_bytes_per_s:
                raise FetchError(
                    "too_slow",
                    f"{held / took:.0f} bytes a second after {took:.0f} s, fewer than "
                    f"{config.min_bytes_per_s}",
                )
            if not is_judged and held >= _ENOUGH_FOR_SIZE:
                is_judged = self._judge_pixels(body)
        if response.length:
            raise FetchError("connect", f"the answer breaks off {response.length} bytes early")
        if not is_judged:
            self._judge_pixels(body)
        return body.getvalue()

    def _judge_pixels(self, body: io.BytesIO) -> bool:
        """Refuse a picture with too many pixels before anybody decodes it; whether its size is known yet."""
        pixels = _num_pixels(body.getbuffer())
        if pixels is None:
            return False
        if pixels > self._config.max_pixels:
            raise FetchError("too_many_pixels", f"more than {self._config.max_pixels} pixels")
        return True

    def _wait_for_turn(self, url: str, timeout: float) -> None:
        """Return when the URL's host may be asked for it. Raises FetchError when it is not to be asked."""
        if self._hosts is None:
            return
        while (origin := self._hosts.ask(url)) is not None:
            try:
                code, body = self._fetch_robots(f"{origin}/robots.txt", timeout)
            except FetchError as err:
                self._hosts.robots_failed(origin, err)
                raise FetchError(err.status, f"robots.txt: {err.reason}") from err
            self._hosts.robots(origin, code, body)

    def _fetch_robots(self, url: str, timeout: float) -> tuple[int, bytes]:
        """Status and the first bytes of a robots.txt, redirects followed (RFC 9309, section 2.3.1.2)."""
        deadline = time.monotonic() + self._config.deadline_s
        for _ in range(MOST_ROBOTS_REDIRECTS + 1):
            request = _Request(url, self._config.user_agent, deadline)
            try:
                self._addresses.check_literal(request.own_name)
                with super().open(request, timeout=timeout) as response:
                    body = io.BytesIO()
                    while body.tell() < ROBOTS_BYTES and (block := response.read1(_BLOCK)):
                        body.write(block)
                if request.is_late:
                    raise TimeoutError
                return response.status, body.getvalue()
            except urllib.error.HTTPError as err:
                target = err.headers.get("Location") if err.code in _REDIRECTS else None
                err.close()
                if target is None:
                    return err.code, b""
                url = _target(url, target)
            except Exception as err:
                raise self._named(err, request) from err
            finally:
                request.end_watch()
        # Too many redirects count as a file that is not there.
        return 404, b""

    def _done(
        self, url: str, request: _Request, error: FetchError | None, retry_after_s: float = 0.0
    ) -> None:
        request.end_watch()
        if self._hosts is not None:
            self._hosts.done(url, error, retry_after_s)

    def _named(self, err: Exception, request: _Request) -> FetchError:
        """What an exception of urllib, http.client or the socket says, by its outcome."""
        if request.is_late:
            return FetchError("too_slow", f"not whole after {self._config.deadline_s:g} s")
        reason = err.reason if isinstance(err, urllib.error.URLError) else err
        if isinstance(reason, FetchError):
            return reason
        words = str(reason) if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        if isinstance(reason, TimeoutError):
            return FetchError("timeout", "the server was silent for too long")
        if isinstance(reason, ssl.SSLError):
            return FetchError("tls", words)
        if isinstance(reason, http.client.InvalidURL | UnicodeError | ValueError):
            return FetchError("bad_url", words)
        if isinstance(reason, str) and "unknown url type" in reason:
            return FetchError("bad_url", reason)
        return FetchError("connect", words)


class _Http(urllib.request.HTTPHandler):
    """http, with connections to allowed addresses alone."""

    def __init__(self, addresses: AddressRules) -> None:
        super().__init__()
        self._addresses = addresses

    def http_open(self, req: Any) -> Any:
        return self.do_open(_connecting(http.client.HTTPConnection, req, self._addresses), req)


class _Https(urllib.request.HTTPSHandler):
    """https likewise."""

    def __init__(self, addresses: AddressRules) -> None:
        super().__init__()
        self._addresses = addresses
        self._checked = ssl.create_default_context()

    def https_open(self, req: Any) -> Any:
        made = _connecting(http.client.HTTPSConnection, req, self._addresses)
        return self.do_open(made, req, context=self._checked)


_DEADLINES = Deadlines()


def _connecting(kind: Callable[..., Any], request: _Request, addresses: AddressRules) -> Any:
    """Makes connections of a kind that go where the rules allow, and are shut down when they are late."""

    def connect(target: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
        made = socket.create_connection if request.is_proxied else addresses.connect
        connection = made(target, timeout, source)
        request.watch = _DEADLINES.watch(connection, request.deadline)
        return connection

    def make(host: str, **given: Any) -> Any:
        connection = kind(host, **given)
        # What http.client itself calls for a socket; there is no public way in.
        connection._create_connection = connect
        return connection

    return make


def _num_pixels(data: memoryview) -> float | None:
    """Pixels that an image's header tells of; None when it does not (yet)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return float(image.width * image.height)
    except Image.DecompressionBombError:
        # Far above what anybody wants here; Pillow does not tell how many.
        return math.inf
    except Exception:  # noqa: BLE001 - half a header may raise anything
        return None


def _target(url: str, location: str) -> str:
    """Where a redirect leads. Raises FetchError for anything but http and https."""
    target = urljoin(url, location.strip())
    if urlsplit(target).scheme not in ("http", "https"):
        raise FetchError(
            "bad_url", f"redirected to {target[:80]!r}, which is neither http nor https"
        )
    return quote(target, safe="%/:=&?~#+!$,;'@()*[]")


def _http_error(err: urllib.error.HTTPError) -> FetchError:
    kind = {4: "http_4xx", 5: "http_5xx"}.get(err.code // 100, "http_other")
    wait = _retry_after_s(err.headers)
    asked = f", retry after {wait:.0f} s" if wait else ""
    return FetchError(kind, f"{err.code} {err.reason}{asked}")


def _retry_after_s(headers: Message) -> float:
    """How long a server wants to be left alone, in s (RFC 9110, section 10.2.3); 0 when it does not say.

    A date is held against the server's own, where it gives one: this machine's clock may be days off.
    """
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    until = _timestamp(value)
    if until is None:
        return 0.0
    now = _timestamp(headers.get("Date") or "")
    return max(0.0, until - (time.time() if now is None else now))


def _timestamp(date: str) -> float | None:
    """An HTTP date in s since the epoch; None when it is none."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except (ValueError, TypeError):
        return None
