"""Kept images whose site has changed its mind: asked for again, a share at a time, and named to be purged.

Who opts out later, or takes a picture down for good, does so after it was fetched. Each round asks for another share of
what is kept, so that all of it is asked for within a stated number of rounds.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage.catalog import query
from storage.intake.download_config import DownloadConfig
from storage.intake.fetching.errors import FetchError
from storage.intake.fetching.host_client import HostClient
from storage.intake.fetching.host_server import HostServer
from storage.intake.fetching.opener import Opener
from storage.intake.plan import fit_for_http
from storage.lake import Lake

logger = logging.getLogger(__name__)

_KEPT = """
SELECT image_id, url FROM pairs
WHERE pool = 'web' AND status = 'ok' AND url ILIKE 'http%' AND hash(image_id) % $parts = $part
ORDER BY hash(image_id, 1) LIMIT $most
"""
STILL_THERE = "still there"
NO_ANSWER = "no answer that says so"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recheck:
    """What asking again has shown."""

    outcomes: Counter[str]
    """Images by what was said of them."""
    to_purge: dict[str, list[str]]
    """Image ids by the reason, which names the evidence."""


def recheck(
    lake: Lake, config: DownloadConfig, *, part: int, parts: int, most: int = 1_000_000
) -> Recheck:
    """Ask again for one of `parts` shares of the web images that are stored, at most `most` of them.

    An image is to be purged when its header opts it out now, robots.txt forbids it now, or the server says that it is
    gone (410). A 404, a host that is down, or a server that fails says nothing: links rot without anybody's wish.
    """
    rows = query(lake, _KEPT, {"parts": parts, "part": part % parts, "most": most}).to_pylist()
    outcomes: Counter[str] = Counter()
    to_purge: dict[str, list[str]] = {}
    progress = os.memfd_create("recheck") if hasattr(os, "memfd_create") else os.open(os.devnull, 1)
    try:
        with HostServer(config.host_rules, patience_s=config.turn_patience_s) as hosts:
            opener = Opener(config.opener, HostClient(hosts.address), progress)
            for image_id, said, reason in _answers(opener, config, rows):
                outcomes[said] += 1
                if reason is not None:
                    to_purge.setdefault(reason, []).append(image_id)
    finally:
        os.close(progress)
    return Recheck(outcomes=outcomes, to_purge=to_purge)


def _answers(
    opener: Opener, config: DownloadConfig, rows: list[dict[str, str]]
) -> Iterator[tuple[str, str, str | None]]:
    """Image, what its site says of it, and why it is to be purged if it is."""

    def ask(row: dict[str, str]) -> tuple[str, str, str | None]:
        url, problem = fit_for_http(row["url"])
        if url is None:
            return row["image_id"], problem or NO_ANSWER, None
        try:
            opener.look(url, config.timeout_s)
        except FetchError as err:
            return row["image_id"], err.status, _wish(err)
        return row["image_id"], STILL_THERE, None

    with ThreadPoolExecutor(config.threads, thread_name_prefix="recheck") as pool:
        yield from pool.map(ask, rows)


def _wish(error: FetchError) -> str | None:
    """Why an image is to go, None when the answer is no wish."""
    if error.status == "opted_out":
        return f"opted out: {error.reason}"
    if error.status == "robots" and "disallows" in error.reason:
        return f"opted out: {error.reason}"
    if error.status == "http_4xx" and error.reason.startswith("410"):
        return f"taken down: {error.reason}"
    return None
