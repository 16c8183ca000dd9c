"""robots.txt as RFC 9309 reads it: what the answer for the file means, then what the file says.

A file that is not there allows everything; one that cannot be had because the server fails forbids everything, until
it can be had again.
"""

import functools
from dataclasses import dataclass

from protego import Protego

MAX_BYTES = 500 * 1024
"""The least that RFC 9309 asks to be read; what comes after it is not."""
VALID_S = 24 * 3600.0
"""How long a file that was had may be relied on."""
FAILED_VALID_S = 300.0
"""After a failure it is asked for again sooner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Robots:
    """What an origin's robots.txt allows."""

    text: str | None
    """None when everything is treated alike."""
    forbids_all: str | None
    """Why everything is forbidden; None when the text decides, or all is allowed."""
    expires_at: float

    def refusal(self, url: str, agent: str) -> str | None:
        """Why a URL must not be fetched; None when it may be."""
        if self.forbids_all is not None:
            return self.forbids_all
        if self.text is not None and not _rules(self.text).can_fetch(url, agent):
            return f"robots.txt disallows it for {agent}"
        return None

    def delay_s(self, agent: str) -> float:
        """The pause between requests that the file asks for, in s; 0 when it asks for none."""
        asked = _rules(self.text).crawl_delay(agent) if self.text is not None else None
        return float(asked or 0.0)


def read_robots(code: int, body: bytes, now: float) -> Robots:
    """What an HTTP answer for robots.txt means (RFC 9309, section 2.3.1)."""
    if code >= 500 or code == 429:
        why = f"robots.txt answers {code}, which is taken as a no"
        return Robots(text=None, forbids_all=why, expires_at=now + FAILED_VALID_S)
    if code != 200 or not body.strip():
        return Robots(text=None, forbids_all=None, expires_at=now + VALID_S)
    text = body[:MAX_BYTES].decode("utf-8", "replace")
    return Robots(text=text, forbids_all=None, expires_at=now + VALID_S)


@functools.lru_cache(maxsize=512)
def _rules(text: str) -> Protego:
    """Read a file; many sites have the same one, and what is read takes many times the room of its text."""
    return Protego.parse(text)
