"""Why a fetch gave nothing, as one line that names the outcome first."""

import re

_LINE = re.compile(r"([a-z0-9_]+): (.*)", re.DOTALL)


class FetchError(OSError):
    """A fetch that gave no image; its text is `STATUS: REASON`, which is all that img2dataset passes on."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


def parsed(line: str) -> tuple[str, str] | None:
    """Status and reason of a FetchError's text; None for any other text."""
    found = _LINE.fullmatch(line)
    return (found.group(1), found.group(2)) if found else None


def is_transient(status: str, reason: str) -> bool:
    """Whether the same URL may give an image when it is asked again."""
    if status == "http_4xx":
        return reason[:3] in TRANSIENT_4XX
    if status == "dns":
        return NO_ANSWER in reason
    return status in TRANSIENT


TRANSIENT = ("timeout", "connect", "http_5xx", "too_slow", "lost")
TRANSIENT_4XX = ("408", "425", "429")

NO_ANSWER = "name servers gave no answer"
"""In the reason of a `dns` failure that says nothing of the name itself."""
