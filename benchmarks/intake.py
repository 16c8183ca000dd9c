"""Intake with all checks on against plain img2dataset, on the same list from the same local server.

    python benchmarks/intake.py [--quick] [--json PATH] [--rows 10000] [--threads 32] [--hosts 50] [--slice-rows N]

A server in a process of its own hands out JPEGs of 256 px, each with bytes of its own, and a robots.txt. The list names
`--hosts` hosts, which all are that server (as a proxy), so that turns and robots.txt count as they do on the web. By turns:

    whole      images/s of `ingest_urls`, list to committed tables, and of img2dataset, list to its folder; start-up in it
    fetch      the same without what ours does beside img2dataset: the run of img2dataset under our supervision alone
    no checks  ours without robots.txt and with more turns at a host than there are threads

Ratios are images a second, ours over theirs. Peak memory is that of the largest process, at `--rows` and at a fourth. With
`--slice-rows` below `--rows` a slice is packed while the next one is fetched. What each check costs: `intake_checks.py`.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from storage import DownloadConfig, Lake, UrlListConfig, ingest_urls, query
from storage.intake.img2dataset import download

TARGET = 0.9
SIDE_PX = 256
SHARD_ROWS = 1000


def pictures() -> list[bytes]:
    """A hundred JPEGs."""
    drawn = np.random.default_rng(0)
    bodies = []
    for _ in range(100):
        smooth = Image.fromarray(drawn.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        data = io.BytesIO()
        smooth.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
        bodies.append(data.getvalue())
    return bodies


def serve() -> None:
    """Answer as a forward proxy until the parent ends; the port goes to standard output."""
    bodies = pictures()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            if name == "robots.txt":
                body = b"User-agent: *\nDisallow: /private/\n"
            else:
                number = int(name.removesuffix(".jpg"))
                # Bytes behind the end of a JPEG are no part of the picture.
                body = bodies[number % len(bodies)] + number.to_bytes(8, "big")
            head = f"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        request_queue_size = 512
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


@contextmanager
def served() -> Iterator[str]:
    """The address of a running server."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def write_list(path: Path, rows: int, hosts: int) -> Path:
    """A list of so many pictures on so many hosts."""
    urls = [f"http://host{n % hosts}.test/pictures/{n}.jpg" for n in range(rows)]
    texts = [f"picture number {n}" for n in range(rows)]
    pq.write_table(pa.table({"url": urls, "alt_text": texts}), path)
    return path


def whole(urls: Path, folder: Path, proxy: str, config: DownloadConfig) -> int:
    """Ours, list to committed tables; images."""
    lake = Lake.open(str(folder / "lake"), create=True)
    ingest_urls(lake, UrlListConfig(path=str(urls)), config, round=1)
    counted = query(lake, "SELECT count(*) AS n FROM pairs WHERE status = 'ok'").to_pylist()
    return int(counted[0]["n"])


def fetch(urls: Path, folder: Path, proxy: str, config: DownloadConfig) -> int:
    """The supervised run of img2dataset alone; images."""
    table = pq.read_table(urls)
    listed = folder / "fetch.parquet"
    rows = pa.table({"row": pa.array(range(table.num_rows)), "url": table.column("url")})
    pq.write_table(rows, listed)
    download(listed, folder / "out", config)
    return _successes(folder / "out")


def plain(urls: Path, folder: Path, proxy: str, config: DownloadConfig) -> int:
    """img2dataset by its own command with the same settings; images."""
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")
    env = (
        os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": ""} | dict.fromkeys(names, proxy)
    )
    command = {
        "url_list": urls,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "alt_text",
        "output_folder": folder / "out",
        "output_format": "webdataset",
        "number_sample_per_shard": config.shard_rows,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": int(config.timeout_s),
        "retries": 0,
        "compute_hash": "sha256",
        "extract_exif": False,
        "enable_wandb": False,
        "image_size": config.image_size_px,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
    }
    arguments = [f"--{name}={value}" for name, value in command.items()]
    subprocess.run(
        [sys.executable, "-m", "img2dataset.main", *arguments],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    return _successes(folder / "out")


def _successes(folder: Path) -> int:
    tables = [pq.read_table(path, columns=["status"]) for path in folder.glob("*.parquet")]
    return sum(table.column("status").to_pylist().count("success") for table in tables)


WAYS: dict[str, Callable[[Path, Path, str, DownloadConfig], int]] = {
    "whole": whole,
    "no checks": whole,
    "fetch": fetch,
    "plain": plain,
}


def config_of(way: str, proxy: str, threads: int, slice_rows: int) -> DownloadConfig:
    """The settings of one way; `plain` reads of them what it has."""
    given: dict[str, Any] = {"robots": "ignore", "per_host": threads} if way == "no checks" else {}
    return DownloadConfig(
        http_proxy=proxy,
        image_size_px=SIDE_PX,
        threads=threads,
        shard_rows=SHARD_ROWS,
        slice_rows=slice_rows,
        **given,
    )


def measured(
    way: str, rows: int, hosts: int, threads: int, proxy: str, slice_rows: int = 1_000_000
) -> dict[str, float]:
    """One run in a process of its own: seconds, and the largest process's peak memory in MiB."""
    asked = [way, str(rows), str(hosts), str(threads), str(slice_rows), proxy]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *asked], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _one(way: str, rows: int, hosts: int, threads: int, slice_rows: int, proxy: str) -> None:
    with tempfile.TemporaryDirectory(prefix="intake-") as name:
        folder = Path(name)
        urls = write_list(folder / "urls.parquet", rows, hosts)
        began = time.perf_counter()
        images = WAYS[way](urls, folder, proxy, config_of(way, proxy, threads, slice_rows))
        seconds = time.perf_counter() - began
    if images != rows:
        raise SystemExit(f"{way}: {images} of {rows} images came; the figures would mean nothing")
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(each.ru_maxrss for each in usage) / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def lines_of(rows: int, found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians over the rounds: images/s by wall time.

    Not by CPU time: nobody waits for workers that are ended once all is there, and so nobody is told theirs.
    """
    lines = []
    for way in ("whole", "fetch", "no checks"):
        ours = rows / median(each["seconds"] for each in found[way])
        theirs = rows / median(each["seconds"] for each in found["plain"])
        lines.append(
            {
                "name": f"intake/{way}/{rows} images/wall_s",
                "ours": round(ours, 1),
                "theirs": round(theirs, 1),
                "ratio": round(ours / theirs, 3),
                "target": TARGET if way == "whole" else None,
            }
        )
    return lines


def main() -> None:
    """Print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of 2,000 images")
    parser.add_argument("--json", type=Path, help="write the lines there too")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--slice-rows", type=int, default=1_000_000)
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    if options.one:
        way, *numbers, proxy = options.one
        _one(way, *map(int, numbers), proxy)
        return
    rows = options.rows or (2000 if options.quick else 10_000)
    rounds = options.rounds or (1 if options.quick else 3)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with served() as proxy:
        how = (options.hosts, options.threads, proxy, options.slice_rows)
        for _ in range(rounds):
            for way in WAYS:
                found[way].append(measured(way, rows, *how))
        small = measured("whole", max(rows // 4, 1), *how)
    lines = lines_of(rows, found)
    large = median(each["peak_mib"] for each in found["whole"])
    lines.append(
        {
            "name": f"intake/peak MiB, {rows} against {max(rows // 4, 1)} images",
            "ours": round(large, 1),
            "theirs": round(small["peak_mib"], 1),
            "ratio": round(large / small["peak_mib"], 3),
            "target": None,
        }
    )
    for line in lines:
        print(json.dumps(line))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
