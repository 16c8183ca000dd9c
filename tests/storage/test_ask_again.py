"""What failed in an earlier round, and may come another time, is asked for again when its list comes again."""

from dataclasses import replace
from pathlib import Path

from hostile_web import serve
from web_world import write_list

from storage import Lake, PartRef, query
from storage.intake.download_config import DownloadConfig
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls

CONFIG = DownloadConfig(
    allow_addresses=("127.0.0.1/32",),
    threads=4,
    shard_rows=5,
    timeout_s=8.0,
    retry_passes=0,
    ask_again_rounds=2,
)


def test_what_may_pass_is_asked_for_again_in_so_many_rounds(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    with serve() as web:
        rows = [(web.url(f"ok.jpg?n={n}"), f"picture {n}") for n in range(1, 7)]
        rows.append((rows[0][0], "another text of the first"))
        url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", rows)))

        def asked_in(round: int, config: DownloadConfig = CONFIG) -> tuple[set[str], list[PartRef]]:
            before = web.requests.copy()
            parts = ingest_urls(lake, url_list, config, round=round)
            asked = {path.rpartition("=")[2] for path in (web.requests - before) if "n=" in path}
            return asked, parts

        web.changed = {"1": "503", "2": "404", "3": "503"}
        asked, _ = asked_in(1)
        assert asked == {"1", "2", "3", "4", "5", "6"}
        asked, parts = asked_in(2, replace(CONFIG, ask_again_rounds=0))
        assert (asked, parts) == (set(), [])
        web.changed = {"2": "404", "3": "503"}
        asked, _ = asked_in(3)
        assert asked == {"1", "3"}
        asked, _ = asked_in(4)
        assert asked == {"3"}
        asked, parts = asked_in(5)
        assert (asked, parts) == (set(), [])
    told = query(
        lake,
        "SELECT alt_text, list(status) AS statuses FROM pairs GROUP BY alt_text",
    ).to_pylist()
    statuses = {row["alt_text"]: sorted(row["statuses"]) for row in told}
    assert statuses["picture 1"] == ["http_5xx", "ok"]
    assert statuses["picture 2"] == ["http_4xx"]
    assert statuses["picture 3"] == ["http_5xx"] * 3
    assert statuses["picture 4"] == ["ok"]
