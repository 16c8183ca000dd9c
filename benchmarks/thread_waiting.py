"""What a training step costs by how OpenMP's threads wait: spinning, asleep, or the first for a moment.

libgomp's threads spin between two parallel pieces of work. On cores of their own that saves the time to wake up; where
cores are shared they take the time of others. A process of its own trains a model for some steps under each
setting, by turns:

    python benchmarks/thread_waiting.py [--quick] [--json PATH] [--busy N] [--presets nano small] [--threads 2]

`--busy N` runs N processes beside it that do nothing but compute. `ours` is OMP_WAIT_POLICY=PASSIVE, `theirs` unset
or another; seconds of a step, medians over rounds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OURS = "passive"
SETTINGS: dict[str, dict[str, str]] = {
    OURS: {"OMP_WAIT_POLICY": "PASSIVE"},
    "unset": {},
    "spin_1000": {"GOMP_SPINCOUNT": "1000"},
}
BATCH = {"nano": 48, "tiny": 16, "small": 4, "base": 2}
WARM_UP, STEPS = 2, 6
QUICK_STEPS = 2


def train(preset: str, threads: int, steps: int) -> dict[str, float]:
    """Train for some steps in this process; returns the seconds of one, by wall and by CPU."""
    import torch
    from our_step import WORDS, OurStep, make_batch
    from plain_blip import Recipe

    from blip_core import MEDConfig, MEDTokenizer, build_model

    torch.set_num_threads(threads)
    tokenizer = MEDTokenizer.train([" ".join(WORDS)] * 3, 400)
    config = MEDConfig.preset(preset, vocab_size=tokenizer.vocab_size)
    recipe = Recipe(queue_size=256)
    ours = OurStep(build_model(config, seed=0), tokenizer, recipe, torch.device("cpu"))
    batch = make_batch(config, BATCH[preset], 14, 0)
    for _ in range(WARM_UP):
        ours(batch, "float32")
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        ours(batch, "float32")
    return {
        "wall": (time.perf_counter() - wall) / steps,
        "cpu": (time.process_time() - cpu) / steps,
    }


def measured(preset: str, threads: int, steps: int, settings: dict[str, str]) -> dict[str, float]:
    """Train in a process of its own, whose OpenMP starts with `settings`."""
    names = {name for each in SETTINGS.values() for name in each}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, __file__, "--child", preset, str(threads), str(steps)],
        env=environment | settings | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compute_for_ever() -> None:
    """Keep a core busy."""
    while True:
        sum(range(10_000))


def compare(preset: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a preset under every setting, by turns; returns a line per other setting and clock."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    order = list(SETTINGS)
    rounds, steps = (1, QUICK_STEPS) if options.quick else (options.rounds, STEPS)
    for number in range(rounds):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            seconds[name].append(measured(preset, options.threads, steps, SETTINGS[name]))
    lines = []
    for name in order[1:]:
        for clock in ("wall", "cpu"):
            ours, theirs = (
                statistics.median(each[clock] for each in seconds[who]) for who in (OURS, name)
            )
            lines.append(
                {
                    "name": f"thread_waiting/{preset}/busy_{options.busy}/{name}/{clock}_s",
                    "ours": round(ours, 4),
                    "theirs": round(theirs, 4),
                    "ratio": round(theirs / ours, 3),
                    "target": None,
                }
            )
            print(json.dumps(lines[-1]), flush=True)
    for name, found in seconds.items():
        print(
            f"{preset}, {name}: "
            + " ".join(f"{each['wall']:.3f}/{each['cpu']:.3f}" for each in found)
        )
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of two steps")
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--presets", nargs="+", default=["nano", "small"], choices=sorted(BATCH))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print."""
    options = parse()
    if options.child:
        preset, threads, steps = options.child
        print(json.dumps(train(preset, int(threads), int(steps))))
        return
    neighbours = [
        multiprocessing.Process(target=compute_for_ever, daemon=True) for _ in range(options.busy)
    ]
    for neighbour in neighbours:
        neighbour.start()
    try:
        lines = [line for preset in options.presets for line in compare(preset, options)]
    finally:
        for neighbour in neighbours:
            neighbour.terminate()
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
