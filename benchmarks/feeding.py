"""Memory and speed of a training set and its order, against a Python list of dicts and a DataLoader over it.

    python benchmarks/feeding.py [--quick] [--json PATH] [--rows 10000 ... 10000000] [--folder DIR]

A synthetic training set (two captions an image) is written for each number of rows, in the form of the lake's.
A process of its own then opens it in one of five ways, asks for rows of two epochs in shuffled order, and reports:

    private    MiB that the process took for itself while two epochs' orders were held
    mapped     MiB of the file that lay in its memory: page cache, given back when anything else needs it
    rows/s     rows looked up in a second of CPU time, an even share of the epoch's shuffling included

`all` and `one` are ours (`captions_per_epoch`); `list` is a list of dicts with the indices of a RandomSampler,
`loader 0` and `loader 2` are a DataLoader over it without and with two worker processes. Ways that would need more
than --max-gib are left out. Ratios are theirs over ours for memory, ours over theirs for speed.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader

from blip_core import decode_image
from flows.order import EpochOrder
from storage import TrainSet
from storage.trainset import BATCH_ROWS, SCHEMA

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
QUICK_ROWS = (10_000, 100_000)
NUM_LOOKUPS = 20_000
BATCH_SIZE = 64
LIST_BYTES = 800
"""Of a row in a list of dicts, about: what --max-gib is compared with."""
TARGET_BYTES_RATIO = 20.0
MIB = 2**20

Row = Callable[[int], Any]


def write_rows(path: Path, num_rows: int) -> None:
    """Write a training set of `num_rows` rows: two captions an image, of the web and synthetic."""
    with pa.ipc.new_file(path, SCHEMA) as writer:
        for first in range(0, num_rows, BATCH_ROWS):
            numbers = range(first, min(first + BATCH_ROWS, num_rows))
            columns = [
                [f"{i // 2:032x}" for i in numbers],
                [f"a photo of thing number {i} on a table by the door" for i in numbers],
                ["synthetic" if i % 2 else "web" for i in numbers],
                [f"web-0001-00-{i // 2000:05d}" for i in numbers],
                [i // 2 % 1000 * 40_960 for i in numbers],
                [20_000 + i % 997 for i in numbers],
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))


def open_rows(path: Path, num_rows: int) -> TrainSet:
    """Open what `write_rows` wrote, as a training does."""
    return TrainSet(pa.ipc.open_file(pa.memory_map(str(path))), num_rows)


def ours(path: Path, num_rows: int, captions_per_epoch: str) -> dict[str, float]:
    """Measure a memory-mapped training set and its order."""
    before = memory()
    rows = open_rows(path, num_rows)
    started = time.process_time()
    order = EpochOrder(
        rows,
        seed=0,
        captions_per_epoch=captions_per_epoch,  # type: ignore[arg-type]
        scratch=path.parent,
    )
    start_s = time.process_time() - started

    def shuffled(epoch: int) -> Row:
        order.row(epoch * len(order))
        return lambda place: rows.row(order.row(epoch * len(order) + place))

    return {"start_s": start_s} | lookups(shuffled, len(order), before)


def plain_list(path: Path, num_rows: int) -> dict[str, float]:
    """Measure a list of dicts, shuffled as PyTorch's RandomSampler does."""
    before = memory()
    started = time.process_time()
    rows = read_list(path)
    start_s = time.process_time() - started

    def shuffled(epoch: int) -> Row:
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(epoch)).tolist()
        return lambda place: rows[order[place]]

    return {"start_s": start_s} | lookups(shuffled, num_rows, before)


def lookups(shuffled: Callable[[int], Row], num_places: int, before: np.ndarray) -> dict[str, Any]:
    """Shuffle two epochs, look rows up in both, and say what it took."""
    started = time.process_time()
    epochs = [shuffled(0), shuffled(1)]
    shuffle_s = (time.process_time() - started) / 2
    count = min(NUM_LOOKUPS, num_places)
    started = time.process_time()
    for row in epochs:
        for place in range(count // 2):
            row(place)
    row_s = (time.process_time() - started) / (count // 2 * 2)
    private, mapped = (memory() - before) / MIB
    rate = 1 / (row_s + shuffle_s / num_places)
    return {"private": private, "mapped": mapped, "rows_s": rate, "shuffle_s": shuffle_s}


def loader(path: Path, num_rows: int, workers: int) -> dict[str, float]:
    """Measure a DataLoader over a list of dicts; private memory is that of all its processes."""
    before = memory()
    rows = read_list(path)
    dataset: Any = rows
    batches = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),
    )
    count, started = 0, time.perf_counter()
    for batch in batches:
        count += len(batch)
        if count >= min(NUM_LOOKUPS, num_rows):
            break
    rate = count / (time.perf_counter() - started)
    private, mapped = (memory() - before) / MIB
    if workers:
        iterator = iter(batches)
        for _ in range(min(NUM_LOOKUPS, num_rows) // BATCH_SIZE):
            next(iterator)
        children = psutil.Process().children(recursive=True)
        private += sum(child.memory_full_info().uss for child in children) / MIB
    return {"private": private, "mapped": mapped, "rows_s": rate}


def read_list(path: Path) -> list[dict[str, Any]]:
    """All rows as a list of dicts."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    rows: list[dict[str, Any]] = []
    for number in range(reader.num_record_batches):
        rows += reader.get_batch(number).to_pylist()
    return rows


def memory() -> np.ndarray:
    """Bytes in memory of this process: its own, and those mapped from files (on Linux)."""
    found = psutil.Process().memory_info()
    return np.array([found.rss - found.shared, found.shared])


WAYS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "all": lambda path, num_rows: ours(path, num_rows, "all"),
    "one": lambda path, num_rows: ours(path, num_rows, "one"),
    "list": plain_list,
    "loader 0": lambda path, num_rows: loader(path, num_rows, 0),
    "loader 2": lambda path, num_rows: loader(path, num_rows, 2),
}


def measured(way: str, path: Path, num_rows: int) -> dict[str, float]:
    """Measure one way in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--file", str(path), "--rows", str(num_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way}, {num_rows} rows: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def all_figures(
    folder: Path, sizes: list[int], max_gib: float
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield way, rows and figures of everything that fits."""
    for num_rows in sizes:
        path = folder / f"{num_rows}.arrow"
        write_rows(path, num_rows)
        try:
            for way in WAYS:
                num_lists = 0 if way in ("all", "one") else 3 if way == "loader 2" else 1
                if num_lists * LIST_BYTES * num_rows > max_gib * 2**30:
                    print(f"{num_rows:>10,} {way:9} left out: needs more than {max_gib} GiB")
                    continue
                yield way, num_rows, measured(way, path, num_rows)
        finally:
            path.unlink()


def lines_of(figures: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return the comparison as lines of {name, ours, theirs, ratio, target}."""
    lines = []
    for mode in ("all", "one"):
        for way in ("list", "loader 0", "loader 2"):
            for num_rows, theirs in figures.get(way, {}).items():
                own, what = figures[mode][num_rows], f"{mode} against {way}, {num_rows:,} rows"
                lines += [
                    line(f"private MiB: {what}", own["private"], theirs["private"], None),
                    line(f"rows/s: {what}", own["rows_s"], theirs["rows_s"], None, is_rate=True),
                ]
        own_growth, growth = bytes_a_row(figures[mode]), bytes_a_row(figures.get("list", {}))
        if own_growth and growth:
            name = f"private bytes for one more row: {mode} against list"
            lines.append(line(name, own_growth, growth, TARGET_BYTES_RATIO))
    return lines


def line(
    name: str, ours: float, theirs: float, target: float | None, *, is_rate: bool = False
) -> dict[str, Any]:
    """Return one line; a ratio above 1 is in our favour."""
    ratio = ours / theirs if is_rate else theirs / max(ours, 1e-3)
    values = {"ours": ours, "theirs": theirs, "ratio": ratio}
    return {"name": name, **{k: float(f"{v:.4g}") for k, v in values.items()}, "target": target}


def bytes_a_row(by_rows: dict[int, dict[str, float]]) -> float | None:
    """Return the private bytes that each further row costs, from the fewest rows to the most."""
    if len(by_rows) < 2:
        return None
    fewest, most = min(by_rows), max(by_rows)
    grown = by_rows[most]["private"] - by_rows[fewest]["private"]
    return grown * MIB / (most - fewest)


def decode_ms() -> float:
    """Return CPU milliseconds of decoding one noisy JPEG of 256 x 256: what a lookup comes before."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256)).save(file, "JPEG", quality=90)
    started = time.process_time()
    for _ in range(100):
        decode_image(file.getvalue())
    return (time.process_time() - started) * 10


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_ROWS} rows")
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--rows", type=int, nargs="+", help=f"default: {ROWS}")
    parser.add_argument("--folder", type=Path, help="where the sets are written for a while")
    parser.add_argument("--max-gib", type=float, default=4.0)
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    options = parse()
    torch.set_num_threads(1)
    if options.way:
        print(json.dumps(WAYS[options.way](options.file, options.rows[0])))
        return
    sizes = options.rows or list(QUICK_ROWS if options.quick else ROWS)
    figures: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for way, num_rows, found in all_figures(Path(folder), sizes, options.max_gib):
            figures.setdefault(way, {})[num_rows] = found
            told = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
            print(f"{num_rows:>10,} {way:9} {told}", flush=True)
    print(f"decoding one image of 256 x 256: {decode_ms():.2f} ms")
    lines = lines_of(figures)
    for each in lines:
        print(json.dumps(each))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
