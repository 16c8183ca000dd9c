"""Thousands of rows of a hostile web: each has one outcome, the right one, and nothing is asked for that must not be.

In the suite it is small. `make soak` runs the same with 100,000 rows and 60 kills, and writes what came out.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile_web import TRAP, HostileWeb, serve
from intake_runs import Kills, MemoryWatch, start
from object_store import object_store
from test_web import rows_of
from web_world import write_list

from storage import Lake, query
from storage.intake.fetching.errors import is_transient

ROWS = int(os.environ.get("BOOTSTRAP_SOAK_ROWS", "160"))
KILLS = int(os.environ.get("BOOTSTRAP_SOAK_KILLS", "3"))
STORE_KILLS = int(os.environ.get("BOOTSTRAP_SOAK_STORE_KILLS", "2"))
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

CONFIG: dict[str, Any] = {
    "allow_addresses": ["127.0.0.1/32"],
    "timeout_s": 3.0,
    "request_deadline_s": 4.0,
    "min_bytes_per_s": 0,
    "max_image_bytes": 2_000_000,
    "threads": 32,
    "per_host": 32,
    # All rows are of one host, and what is asked for again is nearly all failures.
    "host_failures": 1_000_000_000,
    "shard_rows": max(20, min(1_000, ROWS // 20)),
    "slice_rows": 25_000,
    "retry_passes": 1,
    "retry_wait_s": 0.1,
    "robots": "honour",
}


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
        path = write_list(tmp_path / "urls.parquet", [(url, name) for name, url in rows])
        lake = Lake.open(str(tmp_path / "lake"), create=True)
        began = time.monotonic()
        run = start(lake, path, CONFIG)
        with MemoryWatch(run.pid, lake.scratch()) as memory:
            assert run.wait() == 0
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
        path_asked = "/" + url.partition("//")[2].partition("/")[2]
        if url.startswith(web.url("")) and row["status"] not in ("robots", "duplicate_url"):
            # A busy machine may miss an answer and ask again; never more often than it says.
            assert row["attempts"] == asked[path_asked], row
        if is_transient(row["status"], row["reason"] or ""):
            assert row["attempts"] == 2, row
    _report(outcomes, len(rows), seconds, memory)
    wrong = {name: dict(seen) for name, seen in outcomes.items() if not _as_expected(name, seen)}
    assert not wrong
    assert trapped == []
    assert not [page for page in asked if page.startswith("/secret")]
    assert asked["/robots.txt"] == 1


def _as_expected(name: str, seen: Counter[str]) -> bool:
    expected = FAULTS[name][1]
    if expected == "ok or duplicate":
        return seen["ok"] <= 1 and seen["ok"] + seen["duplicate_image"] == seen.total()
    if name == "address again":
        return seen["ok"] == 1 and seen["duplicate_url"] == seen.total() - 1
    return seen[expected] == seen.total()


def _report(
    outcomes: dict[str, Counter[str]], rows: int, seconds: float, memory: MemoryWatch
) -> None:
    """For `make soak`: what came out, as tables."""
    lines = [f"{rows:,} rows in {seconds:,.0f} s: {rows / seconds:.0f} a second.", ""]
    lines += ["| row | rows | outcome |", "|---|---|---|"]
    for name, seen in outcomes.items():
        told = ", ".join(f"`{status}` {number:,}" for status, number in sorted(seen.items()))
        lines.append(f"| {name} | {seen.total():,} | {told} |")
    lines += ["", "| memory, at most | the run | a process of img2dataset |", "|---|---|---|"]
    for fifth in range(5):
        ours, theirs = memory.peaks(fifth / 5, (fifth + 1) / 5)
        lines.append(f"| fifth {fifth + 1} of the time | {ours} MiB | {theirs} MiB |")
    _tell("\n".join(lines))


def _tell(text: str) -> None:
    if OUT is not None:
        with Path(OUT).open("a", encoding="utf-8") as f:
            f.write(f"{text}\n\n")


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

STEADY_CONFIG: dict[str, Any] = {
    "allow_addresses": ["127.0.0.1/32"],
    "timeout_s": 5.0,
    "shard_rows": 20,
    "slice_rows": 60,
    "threads": 8,
    "retry_passes": 1,
    "retry_wait_s": 0.1,
}


@dataclass(frozen=True)
class Undisturbed:
    """A list of a steady web, the lake that it gave, and how long that took."""

    path: Path
    lake: Lake
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    names = random.Random(11).choices(STEADY, k=160 * max(1, KILLS // 3))
    with serve() as web:
        listed = [(FAULTS[name][2](web, n + 100), f"{name} {n}") for n, name in enumerate(names)]
        path = write_list(folder / "urls.parquet", listed)
        lake = Lake.open(str(folder / "lake"), create=True)
        began = time.monotonic()
        assert start(lake, path, STEADY_CONFIG).wait() == 0
        yield Undisturbed(path, lake, time.monotonic() - began)


def test_killed_again_and_again_the_tables_are_those_of_an_undisturbed_run(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    lake, kills = Lake.open(str(tmp_path / "lake"), create=True), Kills(seed=11)
    longest_s = 1.5 * undisturbed.seconds / KILLS
    kills.until_enough(KILLS, lake, lake.scratch(), longest_s, undisturbed.path, STEADY_CONFIG)
    assert_same(lake, undisturbed.lake)
    _tell(f"On a disk, killed {kills.killed.total()} times ({kills}): the same tables and shards.")


def test_killed_on_an_object_store_the_tables_are_those_of_an_undisturbed_run(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    kills = Kills(seed=12)
    with object_store("bucket") as store:
        lake = Lake.open(
            "s3://bucket/lake",
            create=True,
            storage_options=store.options,
            scratch_root=tmp_path / "scratch",
        )
        env = store.environment | {"BOOTSTRAP_SCRATCH": str(tmp_path / "scratch")}
        longest_s = 1.5 * undisturbed.seconds / STORE_KILLS
        kills.until_enough(
            STORE_KILLS, lake, lake.scratch(), longest_s, undisturbed.path, STEADY_CONFIG, **env
        )
        assert_same(lake, undisturbed.lake)
    _tell(f"On S3, killed {kills.killed.total()} times ({kills}): the same tables and shards.")


def assert_same(lake: Lake, other: Lake) -> None:
    """Tables and shards of two lakes are the same, wherever they are."""
    for table in ("pairs", "captions"):
        assert rows_of(lake, table) == rows_of(other, table)
    shards = other.root.list_recursive("shards")
    assert shards
    assert lake.root.list_recursive("shards") == shards
    for shard in shards:
        assert lake.root.read_bytes(shard) == other.root.read_bytes(shard)
