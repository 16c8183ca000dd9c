"""Reading beside a purge: what was read while a part was replaced is read again.

DuckDB opens a file more than once for one query. When a purge puts a part in the place of another meanwhile, the query
fails, or worse, mixes the two. Whoever reads without the lake's lock therefore reads in here.
"""

import json
import time
from collections.abc import Callable
from typing import TypeVar

import duckdb
import pyarrow as pa

from storage import layout
from storage.errors import QueryRefused
from storage.lake import Lake

T = TypeVar("T")

TRIES = 20
PAUSE_S = 0.05
"""Before the second try; a little longer before each further one, ten seconds in all."""


def steadily(lake: Lake, work: Callable[[], T]) -> T:
    """`work()` on parts that stayed as they were; where a purge replaced one meanwhile, again.

    `work` opens its own connection, so that nothing of the files is remembered. Where a purge goes on for longer than
    anybody wants to wait, the last answer counts, or the last error.
    """
    for attempt in range(1, TRIES + 1):
        purges = _purges(lake)
        parts = _parts(lake) if layout.PURGE_BEGUN in purges else None
        try:
            result = work()
        except (duckdb.Error, pa.ArrowException, QueryRefused):
            if attempt == TRIES or _is_steady(lake, purges, parts):
                raise
        else:
            if attempt == TRIES or _is_steady(lake, purges, parts):
                return result
        time.sleep(PAUSE_S * attempt)
    raise AssertionError("the last try has returned or raised")


def _is_steady(lake: Lake, purges: list[str], parts: dict[str, str] | None) -> bool:
    """Whether no purge has replaced anything since the two were taken."""
    now = _purges(lake)
    if layout.PURGE_BEGUN not in now and now == purges:
        return True
    return parts is not None and parts == _parts(lake)


def _purges(lake: Lake) -> list[str]:
    """Records of purges, the unfinished one among them."""
    names = lake.root.list(layout.PURGES)
    return [f"{layout.PURGES}/{name}" for name in names if name.endswith(".json")]


def _parts(lake: Lake) -> dict[str, str]:
    """Hash of every part, and of the one that is about to take its place."""
    found = {}
    for rel in lake.root.list_recursive(layout.TABLES):
        if not rel.endswith(".json"):
            continue
        try:
            manifest = json.loads(lake.root.read_bytes(rel))
            found[rel] = f"{manifest['sha256']} {manifest.get('coming', {}).get('sha256')}"
        except (FileNotFoundError, ValueError, KeyError):
            found[rel] = ""  # removed meanwhile, or damaged: not for this to tell
    return found
