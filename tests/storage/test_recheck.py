"""Who opts out after an image was fetched is heard: kept images are asked for again, and purged."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from hostile_web import HostileWeb, serve
from web_world import write_list

import storage
from storage import Lake, query
from storage.intake.download_config import DownloadConfig
from storage.intake.recheck import recheck
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls

CONFIG = DownloadConfig(allow_addresses=("127.0.0.1/32",), threads=4, shard_rows=5, timeout_s=8.0)
NUM = 12


def _lake(web: HostileWeb, folder: Path) -> Lake:
    rows = [(web.url(f"ok.jpg?n={n}"), f"picture {n}") for n in range(1, NUM + 1)]
    lake = Lake.open(str(folder / "lake"), create=True)
    url_list = UrlListConfig(path=str(write_list(folder / "urls.parquet", rows)))
    ingest_urls(lake, url_list, CONFIG, round=1)
    return lake


def _numbers(lake: Lake, where: str) -> set[str]:
    rows = query(lake, f"SELECT url FROM pairs WHERE {where}").to_pylist()
    return {row["url"].rpartition("=")[2] for row in rows}


def test_only_a_wish_is_a_reason_to_purge(tmp_path: Path) -> None:
    with serve() as web:
        lake = _lake(web, tmp_path)
        web.changed = {"1": "noai", "2": "410", "3": "404", "4": "503", "5": "otherbot: noai"}
        found = recheck(lake, CONFIG, part=0, parts=1)
    assert found.outcomes == Counter(
        {"still there": NUM - 4, "opted_out": 1, "http_4xx": 2, "http_5xx": 1}
    )
    named = {
        reason: _numbers(lake, f"image_id = '{ids[0]}'") for reason, ids in found.to_purge.items()
    }
    assert named == {"opted out: X-Robots-Tag: noai": {"1"}, "taken down: 410 Gone": {"2"}}


def test_robots_txt_that_forbids_later_is_a_wish_and_one_that_fails_is_none(tmp_path: Path) -> None:
    with serve() as web:
        lake = _lake(web, tmp_path)
        web.robots = (503, "")
        assert recheck(lake, CONFIG, part=0, parts=1).to_purge == {}
        web.robots = (200, "User-agent: *\nDisallow: /\n")
        asked = web.requests.total()
        [(reason, ids)] = recheck(lake, CONFIG, part=0, parts=1).to_purge.items()
        assert web.requests.total() == asked + 1
    assert reason == "opted out: robots.txt disallows it for blip-bootstrap"
    assert len(ids) == NUM


def test_shares_together_are_all_images_and_each_is_asked_for_once(tmp_path: Path) -> None:
    with serve() as web:
        lake = _lake(web, tmp_path)
        web.requests.clear()
        total = sum(recheck(lake, CONFIG, part=n, parts=3).outcomes.total() for n in range(5, 8))
        assert total == NUM
        pages = {path: n for path, n in web.requests.items() if path != "/robots.txt"}
        assert pages == {f"/ok.jpg?n={n}": 1 for n in range(1, NUM + 1)}
        assert recheck(lake, CONFIG, part=0, parts=1, most=4).outcomes.total() == 4


def test_the_command_purges_and_says_why(tmp_path: Path) -> None:
    with serve() as web:
        lake = _lake(web, tmp_path)
        web.changed = {"1": "noai", "2": "410"}
        command = [
            sys.executable,
            "-m",
            "flows.cli",
            "recheck",
            "--lake",
            lake.uri,
            "--within",
            "1",
        ]
        command += ["--set", "world=null"]
        command += ["--set", 'ingest.allow_addresses=["127.0.0.1/32"]']
        env = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
        tried = subprocess.run(
            [*command, "--dry-run"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert tried.returncode == 0, tried.stderr[-2000:]
        assert "1 to purge: opted out: X-Robots-Tag: noai" in tried.stdout
        assert _numbers(lake, "status = 'ok'") == {str(n) for n in range(1, NUM + 1)}
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _numbers(lake, "status = 'ok'") == {str(n) for n in range(3, NUM + 1)}
    said = query(
        lake, "SELECT url, reason FROM pairs WHERE status = 'purged' ORDER BY url"
    ).to_pylist()
    assert [row["reason"] for row in said] == [
        "opted out: X-Robots-Tag: noai",
        "taken down: 410 Gone",
    ]
