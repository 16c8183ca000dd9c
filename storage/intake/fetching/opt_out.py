"""Headers by which a site keeps its images out of training: X-Robots-Tag and the TDM reservation.

X-Robots-Tag may name an agent first (`otherbot: noai`); such a line counts for that agent alone. The TDM Reservation
Protocol (W3C community group report, 2024) reserves rights with `tdm-reservation: 1`.
"""

from collections.abc import Iterable
from email.message import Message

ROBOTS_TAG = "X-Robots-Tag"
TDM = "tdm-reservation"
_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives with a colon of their own: what stands before it is no agent."""


def opted_out(
    headers: Message, agent: str, directives: Iterable[str], *, honour_tdm: bool
) -> str | None:
    """The header that opts an image out, as evidence; None when none does."""
    wanted = {each.lower() for each in directives}
    for value in headers.get_all(ROBOTS_TAG, []):
        if _directives_for(str(value), agent) & wanted:
            return f"{ROBOTS_TAG}: {value}"
    if honour_tdm and any(str(v).strip() == "1" for v in headers.get_all(TDM, [])):
        return f"{TDM}: 1"
    return None


def _directives_for(value: str, agent: str) -> set[str]:
    """The directives of one header line that are meant for us.

    `otherbot: noai, noindex` names its agent once for all that follows; another agent may come later in the line.
    """
    found: set[str] = set()
    is_ours = True
    for part in value.split(","):
        name, colon, rest = part.partition(":")
        directive = part
        if colon and name.strip().lower() not in _WITH_VALUES:
            is_ours = name.strip().lower() in (agent.lower(), "*")
            directive = rest
        if is_ours:
            found.add(directive.strip().lower())
    if "none" in found:
        found.add("noindex")
    return found
