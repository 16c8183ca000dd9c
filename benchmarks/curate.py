"""The whole stage, from tars to committed parts, against the loop one writes with transformers and a DataLoader.

    python benchmarks/curate.py [--quick] [--json PATH] [--device cuda] [--images 256] [--batch-size 32]

Both caption every picture (nucleus, the same number of new tokens forced) and score its web text and the new one, with
the same random weights. By turns:

    ours         captions and scores in one pass (`curate.fused: true`), decoded once
    two passes   the same rows in two
    theirs       two loops over a DataLoader (`user_loop.py`), models loaded before the clock starts

Then each side works on 1,000 and 10,000 small pictures with a tiny model in a process of its own, whose largest
resident memory is compared: it should not grow. CPU time is that of all processes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curate_lake import Bench, make, shallow
from side_by_side import DTYPES, print_machine

from blip_core import MEDConfig
from flows.steps.curate_shards import curate_shards
from storage import drop_part, list_parts, read_part

MEMORY_IMAGES = (1_000, 10_000)
TARGET_GROWTH = 1.1
"""Peak memory at the most pictures over that at the fewest."""
QUICK_DEPTH, QUICK_IMAGES = 2, 16
MIB = 1024


def settings_of(options: argparse.Namespace, dtype: str, num_new: int) -> dict[str, Any]:
    """The settings of our side."""
    return {
        "machine": {"device": options.device, "decode_workers": options.workers},
        "caption": {
            "batch_size": options.batch_size,
            "min_new_tokens": num_new,
            "max_new_tokens": num_new,
            "dtype": dtype,
        },
        "score": {"batch_size": options.batch_size, "dtype": dtype},
    }


def ours(bench: Bench, settings: dict[str, Any], *, fused: bool) -> dict[str, float]:
    """Curate the lake from nothing; rows written, and seconds that the models waited."""
    run = bench.run(settings)
    for table in ("captions", "scores"):
        for part in list_parts(run.lake, table, 1):
            drop_part(run.lake, part)
    both = (bench.captioner, bench.scorer)
    passes = [both] if fused else [(bench.captioner, None), (None, bench.scorer)]
    curated = [curate_shards(run, *each, lambda done, total, note: None) for each in passes]
    rows = sum(part.num_rows for each in curated for part in each.parts)
    return {"rows": rows, "wait": sum(each.timings["wait"] for each in curated)}


def theirs(bench: Bench, options: argparse.Namespace, dtype: str, num_new: int) -> Any:
    """Load their side; returns a function that does the same."""
    from user_loop import UserLoop

    loop = UserLoop.load(
        bench.captioner_folder,
        bench.scorer_folder,
        DTYPES[dtype],
        batch_size=options.batch_size,
        num_new=num_new,
        workers=options.workers,
        device=options.device,
    )

    def run() -> dict[str, float]:
        rows = loop.run(bench.tars, bench.captioner_folder.parent / "theirs")
        return {"rows": rows, "wait": loop.waited_s}

    return run


def measure(
    calls: dict[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Call each side once to warm up, then by turns; medians of wall and CPU seconds and of the share waited."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    order = list(calls)
    for number in range(rounds + 1):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            cpu, wall = cpu_seconds(), time.perf_counter()
            found = calls[name]()
            wall = time.perf_counter() - wall
            if number:
                figures = {"wall": wall, "cpu": cpu_seconds() - cpu, "wait": found["wait"] / wall}
                seen[name].append(figures | {"rows": found["rows"]})
    return {
        name: {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        for name, figures in seen.items()
    }


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def check_equal_work(bench: Bench, num_new: int, figures: dict[str, dict[str, float]]) -> None:
    """SystemExit unless both sides wrote all rows, and ours captions of the forced length."""
    for name, found in figures.items():
        if found["rows"] != 3 * bench.num_images:
            raise SystemExit(f"not the same work: {name} wrote {found['rows']:.0f} rows")
    for part in list_parts(bench.lake, "captions", 1):
        lengths = set(read_part(bench.lake, part, ["num_tokens"]).column(0).to_pylist())
        if lengths != {num_new}:
            raise SystemExit(f"not the same work: captions of {lengths} tokens, not {num_new}")


def line(name: str, own: float, other: float, ratio: float, target: float | None) -> dict[str, Any]:
    """One line, printed; a ratio above 1 is in our favour."""
    values = {"ours": own, "theirs": other, "ratio": ratio}
    made = {"name": name, **{k: float(f"{v:.4g}") for k, v in values.items()}, "target": target}
    print(json.dumps(made), flush=True)
    return made


def compare(
    prefix: str, bench: Bench, figures: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Images a second by both clocks, and the share of the time that the models waited for images."""
    lines, other = [], figures["theirs"]
    for name in ("ours", "two passes"):
        own, title = figures[name], f"{prefix}/{'one pass' if name == 'ours' else name}"
        for clock in ("cpu", "wall"):
            rates = [bench.num_images / each[clock] for each in (own, other)]
            lines.append(line(f"{title}/images_{clock}_s", *rates, rates[0] / rates[1], None))
        waits = own["wait"], other["wait"]
        ratio = waits[1] / max(waits[0], 1e-4)
        lines.append(line(f"{title}/share_waited", *waits, ratio, None))
    return lines


def speed(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compare the two sides on pictures of 640 x 480."""
    num_new = options.num_new or (8 if options.quick else 16)
    config = MEDConfig.preset(options.preset, image_size_px=options.image_size)
    config = shallow(config, QUICK_DEPTH) if options.quick else config
    shard_images = -(-options.images // options.shards)
    bench = make(folder, config, images=options.images, shard_images=shard_images, size=(640, 480))
    depths = f"{config.vision.depth} and {config.text.depth} layers, {options.image_size} px"
    print(f"{options.preset}, {depths}, {options.images} images of 640 x 480, {num_new} new tokens")
    lines = []
    for dtype in options.dtype:
        settings = settings_of(options, dtype, num_new)
        calls = {
            "ours": lambda settings=settings: ours(bench, settings, fused=True),
            "two passes": lambda settings=settings: ours(bench, settings, fused=False),
            "theirs": theirs(bench, options, dtype, num_new),
        }
        figures = measure(calls, 1 if options.quick else options.rounds)
        check_equal_work(bench, num_new, figures)
        lines += compare(f"curate/{dtype}", bench, figures)
    return lines


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare peak memory at few and at many pictures, each in a process of its own."""
    peaks: dict[str, list[float]] = {"ours": [], "theirs": []}
    for side, found in peaks.items():
        for images in options.memory_images:
            command = [sys.executable, __file__, "--side", side, "--images", str(images)]
            command += ["--workers", str(options.workers), "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{side}, {images} images: {done.stderr[-2000:]}")
            found.append(float(done.stdout.splitlines()[-1]))
    own, other = peaks["ours"], peaks["theirs"]
    lines = [
        line(f"curate/peak_mib/{images:,} images", mine, yours, yours / mine, None)
        for images, mine, yours in zip(options.memory_images, own, other, strict=True)
    ]
    growth = own[-1] / own[0], other[-1] / other[0]
    lines.append(line("curate/peak_growth", *growth, growth[1] / growth[0], None))
    within = "within" if growth[0] <= TARGET_GROWTH else "BEYOND"
    print(f"our peak memory grows by {growth[0]:.3f}, {within} {TARGET_GROWTH}")
    return lines


def one_side(options: argparse.Namespace) -> None:
    """Work on small pictures with a tiny model and print the largest resident memory, MiB."""
    config = MEDConfig.preset("tiny")
    options.batch_size, options.device = 64, "cpu"
    with tempfile.TemporaryDirectory() as name:
        bench = make(Path(name), config, images=options.images, shard_images=250, size=(64, 64))
        if options.side == "ours":
            ours(bench, settings_of(options, "float32", 4), fused=True)
        else:
            theirs(bench, options, "float32", 4)()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one round, float32, {QUICK_DEPTH} layers a stack, {QUICK_IMAGES} images",
    )
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: both")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--image-size", type=int, default=384, help="pixels")
    parser.add_argument("--images", type=int, help="default 64, 16 with --quick")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--num-new", type=int, help="tokens of a caption; default 16, 8 with --quick"
    )
    parser.add_argument("--workers", type=int, default=2, help="that decode, on both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-images", nargs="+", type=int, default=list(MEMORY_IMAGES))
    parser.add_argument("--only", choices=("speed", "memory"), help="one of the two parts")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.images = options.images or (QUICK_IMAGES if options.quick else 64)
    options.dtype = options.dtype or (["float32"] if options.quick else list(DTYPES))
    return options


def main() -> None:
    """Measure speed, then memory."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.side:
        one_side(options)
        return
    print_machine(options.device)
    lines: list[dict[str, Any]] = []
    if options.only != "memory":
        with tempfile.TemporaryDirectory() as name:
            lines += speed(options, Path(name))
    if options.only != "speed":
        lines += memory(options)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
