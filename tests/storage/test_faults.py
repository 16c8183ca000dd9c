"""Thousands of rows of a hostile web: each has one outcome, the right one, and nothing is asked for that must not be.

In the suite it is small. `make soak` runs the same with 100,000 rows and 50 kills, and writes what came out.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hostile_web import TRAP, HostileWeb, serve
from test_web import processes_of, rows_of
from web_world import write_list

import storage
from storage import Lake, query
from storage.intake.download_config import DownloadConfig
from storage.intake.fetching.errors import is_transient
from storage.intake.url_list import UrlListConfig
from storage.intake.web import ingest_urls

ROWS = int(os.environ.get("BOOTSTRAP_SOAK_ROWS", "160"))
KILLS = int(os.environ.get("BOOTSTRAP_SOAK_KILLS", "3"))
OUT = os.environ.get("BOOTSTRAP_SOAK_OUT")

Page = Callable[[HostileWeb, int], str]

FAULTS: dict[str, tuple[float, str, Page]] = {
    "picture": (40, "ok", lambda web, n: web.url(f"ok.jpg?n={n}")),
    "moved": (3, "ok", lambda web, n: web.url(f"moved.jpg?n={n}")),
    "fails once": (3, "ok", lambda web, n: web.url(f"flaky.jpg?n={n}")),
    "missing": (5, "http_4xx", lambda web, n: web.url(f"none.jpg?n={n}")),
    "gone": (3, "http_4xx", lambda web, n: web.url(f"gone.jpg?n={n}")),
    "too many requests": (1, "http_4xx", lambda web, n: web.url(f"busy.jpg?s=0&n={n}")),
    "unavailable": (2, "http_5xx", lambda web, n: web.url(f"broken.jpg?n={n}")),
    "silent": (0.5, "timeout", lambda web, n: web.url(f"silent.jpg?n={n}")),
    "headers drip": (0.5, "too_slow", lambda web, n: web.url(f"slow_headers.jpg?n={n}")),
    "body drips": (0.5, "too_slow", lambda web, n: web.url(f"drip.jpg?n={n}")),
    "endless": (0.5, "too_large", lambda web, n: web.url(f"endless.jpg?n={n}")),
    "breaks off": (2, "connect", lambda web, n: web.url(f"short.jpg?n={n}")),
    "reset": (2, "connect", lambda web, n: web.url(f"reset.jpg?n={n}")),
    "not http": (1, "connect", lambda web, n: web.url(f"garbage.jpg?n={n}")),
    "gzip bomb": (0.3, "not_an_image", lambda web, n: web.url(f"gzip.jpg?n={n}")),
    "png bomb": (0.3, "too_many_pixels", lambda web, n: web.url(f"png_bomb.jpg?n={n}")),
    "html": (4, "not_an_image", lambda web, n: web.url(f"html.jpg?n={n}")),
    "svg": (1, "not_an_image", lambda web, n: web.url(f"svg.jpg?n={n}")),
    "half a picture": (2, "decode_error", lambda web, n: web.url(f"truncated.jpg?n={n}")),
    "redirects without end": (1, "http_other", lambda web, n: web.url(f"loop.jpg?n=0&row={n}")),
    "redirect to a private address": (
        2,
        "blocked_address",
        lambda web, n: web.url(f"to?where=http://{TRAP}:{web.trap_port}/{n}"),
    ),
    "private address": (2, "blocked_address", lambda web, n: f"http://{TRAP}:{web.trap_port}/{n}"),
    "redirect to a file": (1, "bad_url", lambda web, n: web.url(f"to?where=file:///etc/{n}")),
    "file": (1, "bad_url", lambda web, n: f"file:///etc/{n}"),
    "robots.txt": (3, "robots", lambda web, n: web.url(f"secret/{n}.jpg")),
    "robots.txt, redirected": (1, "robots", lambda web, n: web.url(f"to?where=/secret/{n}.jpg")),
    "X-Robots-Tag": (3, "opted_out", lambda web, n: web.url(f"tagged.jpg?tag=noai&n={n}")),
    "our own tag": (
        1,
        "opted_out",
        lambda web, n: web.url(f"tagged.jpg?tag=blip-bootstrap:noml&n={n}"),
    ),
    "another's tag": (1, "ok or duplicate", lambda web, n: web.url(f"tagged.jpg?tag=x:noai&n={n}")),
    "reserved": (2, "opted_out", lambda web, n: web.url(f"tdm.jpg?n={n}")),
    "alias of one picture": (6, "ok or duplicate", lambda web, n: web.url(f"ok.jpg?n=0&alias={n}")),
    "address again": (3, "duplicate_url", lambda web, n: web.url("ok.jpg?n=1000000")),
}
"""By class of row: how frequent, its outcome, its address. Addresses that repeat end as one picture and its repeats."""

CONFIG = DownloadConfig(
    allow_addresses=("127.0.0.1/32",),
    timeout_s=3.0,
    request_deadline_s=4.0,
    min_bytes_per_s=0,
    max_image_bytes=2_000_000,
    threads=32,
    per_host=32,
    shard_rows=max(20, ROWS // 100),
    retry_passes=1,
    retry_wait_s=0.1,
    robots="honour",
)


def _rows(web: HostileWeb) -> list[tuple[str, str]]:
    """Class and address of each row: every class at least twice, the others by their frequency."""
    drawn = random.Random(7)
    weights = [weight for weight, _, _ in FAULTS.values()]
    names = [name for name in FAULTS for _ in range(2)]
    names += drawn.choices(list(FAULTS), weights, k=max(0, ROWS - len(names)))
    drawn.shuffle(names)
    return [(name, FAULTS[name][2](web, number + 100)) for number, name in enumerate(names)]


def test_every_row_of_a_hostile_web_has_its_outcome(tmp_path: Path) -> None:
    with serve() as web:
        web.robots = (200, "User-agent: *\nDisallow: /secret/\n")
        rows = _rows(web)
        listed = [(url, name) for name, url in rows]
        url_list = UrlListConfig(path=str(write_list(tmp_path / "urls.parquet", listed)))
        lake = Lake.open(str(tmp_path / "lake"), create=True)
        began = time.monotonic()
        ingest_urls(lake, url_list, CONFIG, round=1)
        seconds = time.monotonic() - began
        asked, trapped = Counter(web.requests), list(web.trapped)
    found = query(
        lake, "SELECT row, alt_text AS fault, status, reason, attempts FROM pairs ORDER BY row"
    ).to_pylist()
    assert [row["row"] for row in found] == list(range(len(rows)))
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    for row, (name, url) in zip(found, rows, strict=True):
        outcomes[name][row["status"]] += 1
        assert row["attempts"] <= 2
        path = "/" + url.partition("//")[2].partition("/")[2]
        if url.startswith(web.url("")) and row["status"] not in ("robots", "duplicate_url"):
            # A busy machine may miss an answer and ask again; never more often than it says.
            assert row["attempts"] == asked[path], row
        if is_transient(row["status"], row["reason"] or ""):
            assert row["attempts"] == 2, row
    wrong = {name: dict(seen) for name, seen in outcomes.items() if not _as_expected(name, seen)}
    assert not wrong
    assert trapped == []
    assert not [path for path in asked if path.startswith("/secret")]
    assert asked["/robots.txt"] == 1
    _report(outcomes, len(rows), seconds)


def _as_expected(name: str, seen: Counter[str]) -> bool:
    expected = FAULTS[name][1]
    if expected == "ok or duplicate":
        return seen["ok"] <= 1 and seen["ok"] + seen["duplicate_image"] == seen.total()
    if name == "address again":
        return seen["ok"] == 1 and seen["duplicate_url"] == seen.total() - 1
    return seen[expected] == seen.total()


def _report(outcomes: dict[str, Counter[str]], rows: int, seconds: float) -> None:
    """For `make soak`: what came out, as a table."""
    if OUT is None:
        return
    peak = max(
        resource.getrusage(who).ru_maxrss // 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    lines = [f"{rows:,} rows in {seconds:.0f} s, {peak} MiB at most in a process.", ""]
    lines += ["| row | rows | outcome |", "|---|---|---|"]
    for name, seen in outcomes.items():
        told = ", ".join(f"`{status}` {number:,}" for status, number in sorted(seen.items()))
        lines.append(f"| {name} | {seen.total():,} | {told} |")
    Path(OUT).write_text("\n".join(lines) + "\n", encoding="utf-8")


STEADY = (
    "picture",
    "moved",
    "missing",
    "html",
    "half a picture",
    "reserved",
    "alias of one picture",
)
"""Classes that a server answers alike however often it is asked."""

SCRIPT = """
import json, sys
from storage import DownloadConfig, Lake, UrlListConfig, ingest_urls
lake, urls, config = Lake.open(sys.argv[1]), UrlListConfig(path=sys.argv[2]), json.loads(sys.argv[3])
ingest_urls(lake, urls, DownloadConfig(**config), round=1)
"""
STEADY_CONFIG = {
    "allow_addresses": ["127.0.0.1/32"],
    "timeout_s": 5.0,
    "shard_rows": 20,
    "slice_rows": 60,
    "threads": 8,
    "retry_passes": 1,
    "retry_wait_s": 0.1,
}


def test_killed_again_and_again_the_tables_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    drawn = random.Random(11)
    with serve() as web:
        names = drawn.choices(STEADY, k=160)
        listed = [(FAULTS[name][2](web, n + 100), f"{name} {n}") for n, name in enumerate(names)]
        path = write_list(tmp_path / "urls.parquet", listed)
        disturbed = Lake.open(str(tmp_path / "a"), create=True)
        undisturbed = Lake.open(str(tmp_path / "b"), create=True)
        began = time.monotonic()
        _start(undisturbed, path).wait(300)
        whole_s = time.monotonic() - began
        killed = Counter[str]()
        run = _start(disturbed, path)
        while killed.total() < KILLS:
            time.sleep(drawn.uniform(0.0, whole_s / 2))
            if run.poll() is not None:
                # It came to its end between two kills: what is left is to be gone on with as well.
                disturbed.root.remove("rounds/0001/intake-web-00.json")
                run = _start(disturbed, path)
            elif drawn.random() < 0.5:
                run.send_signal(signal.SIGKILL)
                run.wait()
                killed["the run"] += 1
                run = _start(disturbed, path)
            elif workers := processes_of(disturbed):
                os.kill(drawn.choice(workers), signal.SIGKILL)
                killed["a process of img2dataset"] += 1
        assert run.wait(300) == 0
        for table in ("pairs", "captions"):
            assert rows_of(disturbed, table) == rows_of(undisturbed, table)
        for shard in undisturbed.root.list_recursive("shards"):
            assert disturbed.root.read_bytes(shard) == undisturbed.root.read_bytes(shard)
    if OUT is not None:
        told = ", ".join(f"{name} {number} times" for name, number in killed.items())
        with Path(OUT).open("a", encoding="utf-8") as f:
            f.write(f"\nKilled {killed.total()} times ({told}): the same tables and shards.\n")


def _start(lake: Lake, path: Path) -> subprocess.Popen[bytes]:
    home = str(Path(storage.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, lake.uri, str(path), json.dumps(STEADY_CONFIG)],
        env=os.environ | {"PYTHONPATH": home},
    )
