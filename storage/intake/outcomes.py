"""What became of a URL, in a few words that SQL can group by, from what img2dataset says."""

import re

from storage.schemas import OK

_HTTP = re.compile(r"HTTP Error (\d)(\d\d)")

_MARKS = (
    ("opted_out", ("disallowed by X-Robots-Tag",)),
    ("too_large", ("response exceeds", "image area too large")),
    ("too_small", ("image too small",)),
    ("timeout", ("timed out", "Timeout")),
    ("not_an_image", ("Image decoding error",)),
    (
        "bad_url",
        ("unknown url type", "can't contain", "no host given", "Invalid IPv6", "nonnumeric port"),
    ),
    (
        "connect",
        ("urlopen error", "Connection", "Remote end closed", "IncompleteRead", "BadStatusLine"),
    ),
)
"""Statuses with the words that tell them, the first that fits counts."""

STATUSES = (
    OK,
    "http_4xx",
    "http_5xx",
    "http_other",
    "timeout",
    "connect",
    "opted_out",
    "bad_url",
    "bad_text",
    "not_an_image",
    "decode_error",
    "too_small",
    "too_large",
    "duplicate_url",
    "duplicate_image",
    "lost",
    "purged",
    "other",
)
"""Every status of a web pair. `lost` means that the fetcher left no word of the row, `purged` that the image was taken
out on request, or not taken in because one was."""


def status_of(error: str) -> str:
    """The status for an error message of img2dataset."""
    http = _HTTP.search(error)
    if http is not None:
        return {"4": "http_4xx", "5": "http_5xx"}.get(http.group(1), "http_other")
    for status, marks in _MARKS:
        if any(mark in error for mark in marks):
            return status
    return "other"
