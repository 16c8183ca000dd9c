"""What became of a URL, in a few words that SQL can group by, from what the fetch left of it."""

import re

from storage.intake.fetching.errors import parsed
from storage.schemas import OK

_MARKS = (
    ("too_many_pixels", ("image area too large",)),
    ("too_small", ("image too small",)),
    ("not_an_image", ("Image decoding error",)),
)
"""Statuses with the words of img2dataset that tell them; all else comes from our own opener."""

STATUSES = (
    OK,
    "http_4xx",
    "http_5xx",
    "http_other",
    "dns",
    "connect",
    "tls",
    "timeout",
    "too_slow",
    "too_large",
    "opted_out",
    "robots",
    "blocked_address",
    "bad_url",
    "bad_text",
    "not_an_image",
    "decode_error",
    "too_small",
    "too_many_pixels",
    "duplicate_url",
    "duplicate_image",
    "near_duplicate",
    "eval_overlap",
    "unsafe",
    "lost",
    "purged",
    "other",
)
"""Every status of a web pair. `lost` means that the fetcher left no word of the row, `purged` that the image was taken
out on request, or not taken in because one was."""


_WORDS_OF_IMG2DATASET = (
    ("opted_out", ("X-Robots-Tag", "disallowed")),
    (
        "dns",
        (
            "Name or service not known",
            "nodename nor servname",
            "name resolution",
            "No address associated",
        ),
    ),
    ("timeout", ("timed out",)),
    ("tls", ("CERTIFICATE_VERIFY", "SSL", "ssl")),
    (
        "bad_url",
        (
            "unknown url type",
            "no host given",
            "URL can't contain",
            "nonnumeric port",
            "unknown url",
        ),
    ),
    (
        "connect",
        (
            "refused",
            "reset by peer",
            "closed connection",
            "IncompleteRead",
            "unreachable",
            "No route to host",
        ),
    ),
)
"""Statuses with words of urllib's that tell them, as img2dataset writes them down when nobody watches it."""
_HTTP_ERROR = re.compile(r"HTTP Error (\d)\d\d")


def outcome_of_img2dataset(error: str) -> tuple[str, str]:
    """Status and reason for an error message that img2dataset left in a folder of its own making."""
    answered = _HTTP_ERROR.search(error)
    if answered is not None:
        kind = answered.group(1)
        return (f"http_{kind}xx" if kind in "45" else "http_other"), error
    for status, words in _WORDS_OF_IMG2DATASET:
        if any(word in error for word in words):
            return status, error
    return outcome_of(error)


def outcome_of(error: str) -> tuple[str, str]:
    """Status and reason for an error message that img2dataset passed on."""
    ours = parsed(error)
    if ours is not None and ours[0] in STATUSES:
        return ours
    for status, marks in _MARKS:
        if any(mark in error for mark in marks):
            return status, error
    return "other", error
