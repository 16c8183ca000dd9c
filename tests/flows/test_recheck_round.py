"""Before a later round kept images are asked for again, once, and who has opted out since is purged."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cycle import FinishedCycle, bootstrap, copied, write_settings

from flows.quickstart.world import load_world
from flows.settings import parse_settings
from flows.steps.recheck import recheck_before_round
from storage import Lake, layout, query


class _Web(ThreadingHTTPServer):
    daemon_threads = True
    asked = 0


@pytest.fixture
def opted_out() -> Iterator[_Web]:
    """A web, as a proxy, in which every picture opts out now."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_robots = self.path.endswith("/robots.txt")
            web.asked += not is_robots
            self.send_response(404 if is_robots else 200)
            self.send_header("X-Robots-Tag", "noai")
            self.send_header("Content-Type", "image/png")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with _Web(("127.0.0.1", 0), Handler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        yield web
        web.shutdown()


def _cycle(finished: FinishedCycle, folder: Path, web: _Web, **changes: object) -> FinishedCycle:
    """A copy of a finished lake whose next rounds ask the web for all that it keeps."""
    cycle = copied(finished, folder)
    world = load_world(Path(cycle.settings["world"]["folder"]))
    human = {"captions": str(world.human_captions), "images": str(world.human_images)}
    ingest = cycle.settings["ingest"] | {
        "human": [human],
        "http_proxy": f"http://127.0.0.1:{web.server_port}",
        "recheck_within_rounds": 1,
        "recheck_most": 7,
    }
    settings = cycle.settings | {"ingest": ingest | changes, "world": None, "cycle": "next-round"}
    write_settings(cycle.config, settings)
    return FinishedCycle(
        folder=folder, lake=cycle.lake, config=cycle.config, settings=settings, output=""
    )


def test_a_later_round_asks_again_within_its_budget_and_purges(
    finished: FinishedCycle, tmp_path: Path, opted_out: _Web, api_url: str
) -> None:
    cycle = _cycle(finished, tmp_path, opted_out)
    done = bootstrap("next-round", "--config", str(cycle.config), cwd=tmp_path, api_url=api_url)
    lake = Lake.open(str(cycle.lake))
    assert opted_out.asked == 7, done.stderr[-2000:]
    record = json.loads(lake.root.read_bytes(layout.recheck_record(1)))
    assert record["outcomes"] == {"opted_out": 7}
    assert (record["part"], record["parts"]) == (0, 1)
    gone = query(lake, "SELECT because, count(*) AS n FROM purges GROUP BY ALL").to_pylist()
    assert gone == [{"because": "opted out: X-Robots-Tag: noai", "n": 1}]
    purged = query(lake, "SELECT count(DISTINCT image_id) FROM pairs WHERE status = 'purged'")
    assert purged.column(0).to_pylist() == [7]
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = query(lake, "SELECT DISTINCT round FROM rounds ORDER BY round").column(0).to_pylist()
    assert numbers == [1, 2]


def test_a_round_that_is_gone_on_with_does_not_ask_twice_and_null_asks_for_none(
    finished: FinishedCycle, tmp_path: Path, opted_out: _Web
) -> None:
    cycle = _cycle(finished, tmp_path, opted_out)
    settings = parse_settings(cycle.settings)
    off = settings.with_changes({"ingest": {"recheck_within_rounds": None}})
    assert recheck_before_round(off) is None
    assert opted_out.asked == 0
    first = recheck_before_round(settings)
    assert first is not None
    assert first.found.outcomes.total() == 7
    assert recheck_before_round(settings) is None
    assert opted_out.asked == 7
