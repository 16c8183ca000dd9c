"""What may come another time is asked for again, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest
from hostile_web import HostileWeb, serve
from web_world import write_list

from storage import EmptyInput, Lake, query
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls

OUTCOMES = {
    "ok.jpg?n=1": ("ok", 1),
    "flaky.jpg?n=2": ("ok", 2),
    "flaky.jpg?n=3": ("ok", 2),
    "broken.jpg": ("http_5xx", 3),
    "reset.jpg": ("connect", 3),
    "gone.jpg": ("http_4xx", 1),
    "tdm.jpg": ("opted_out", 1),
    "html.jpg": ("not_an_image", 1),
}
"""By page: status in the end, and how often it is asked for."""


def _ingest(web: HostileWeb, folder: Path, **changes: Any) -> Lake:
    rows = [(web.url(page), f"a text for {page}") for page in OUTCOMES]
    url_list = UrlListConfig(path=str(write_list(folder / "urls.parquet", rows)))
    lake = Lake.open(str(folder / "lake"), create=True)
    given = {
        "allow_addresses": ("127.0.0.1/32",),
        "timeout_s": 8.0,
        "shard_rows": 3,
        "threads": 4,
        "retry_passes": 2,
        "retry_wait_s": 0.1,
    }
    ingest_urls(lake, url_list, DownloadConfig(**given | changes), round=1)
    return lake


def _outcomes(lake: Lake) -> dict[str, tuple[str, int]]:
    rows = query(lake, "SELECT url, status, attempts FROM pairs ORDER BY row").to_pylist()
    return {row["url"].rpartition("/")[2]: (row["status"], row["attempts"]) for row in rows}


def test_transient_failures_are_asked_for_again_and_others_are_not(tmp_path: Path) -> None:
    with serve() as web:
        lake = _ingest(web, tmp_path)
        assert _outcomes(lake) == OUTCOMES
        asked = {f"/{page}": times for page, (_, times) in OUTCOMES.items()}
        assert web.requests == asked | {"/robots.txt": 1}


def test_without_passes_each_row_is_asked_for_once(tmp_path: Path) -> None:
    with serve() as web:
        lake = _ingest(web, tmp_path, retry_passes=0)
        assert {attempts for _, attempts in _outcomes(lake).values()} == {1}
        assert set(web.requests.values()) == {1}


def test_addresses_of_this_machine_are_not_asked_unless_allowed(tmp_path: Path) -> None:
    with serve() as web:
        with pytest.raises(EmptyInput, match="blocked_address 8"):
            _ingest(web, tmp_path, allow_addresses=())
        assert not web.requests
