"""What the benchmarks of captioning and scoring share: two sides by turns, clocks, targets and the machine."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip_core import MEDConfig

Call = Callable[[], Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def measure(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Call each side once to warm up and then by turns; returns the median seconds `cpu` and `wall` of each."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in calls}
    order = list(calls)
    for number in range(rounds + 1):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            _wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            _wait(device)
            if number:
                seconds[name]["cpu"].append(time.process_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
    return {
        name: {clock: statistics.median(values) for clock, values in clocks.items()}
        for name, clocks in seconds.items()
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Table:
    """The lines of a benchmark: {name, ours, theirs, ratio, target}, printed as they come."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.lines: list[dict[str, Any]] = []

    def add(
        self, name: str, calls: Mapping[str, Call], rounds: int, target: float | None
    ) -> dict[str, dict[str, float]]:
        """Measure `ours` against `theirs`; the target is of CPU time on a CPU, of wall time on a GPU."""
        seconds = measure(calls, rounds, self.device)
        judged = "wall" if self.device == "cuda" else "cpu"
        for clock in ("wall",) if self.device == "cuda" else ("cpu", "wall"):
            ours, theirs = seconds["ours"][clock], seconds["theirs"][clock]
            line = {
                "name": f"{name}/{clock}_s",
                "ours": round(ours, 4),
                "theirs": round(theirs, 4),
                "ratio": round(theirs / ours, 3),
                "target": target if clock == judged else None,
            }
            self.lines.append(line)
            print(json.dumps(line), flush=True)
        return seconds

    def write(self, path: Path | None) -> None:
        """Write the lines where --json says."""
        if path is not None:
            path.write_text(json.dumps(self.lines, indent=1) + "\n", encoding="utf-8")


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in tiles (AMX)."""
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(asks()) if asks is not None else False


def target_here(with_amx: float, device: str) -> float:
    """The target that holds on this machine: three quarters of the gain on a CPU without AMX."""
    if device == "cuda" or has_amx():
        return with_amx
    return round(1.0 + 0.75 * (with_amx - 1.0), 3)


def print_machine(device: str) -> None:
    """Say what the figures are of."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    amx = "" if device == "cuda" else f", AMX {'yes' if has_amx() else 'no'}"
    print(f"{name}{amx}, torch {torch.__version__}, Python {platform.python_version()}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} cores of {named[0]}" if named else platform.machine()


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of one large product, the best of five: what the machine can do now."""
    size = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait(device)
        start = time.perf_counter() if device == "cuda" else time.process_time()
        for _ in range(3):
            left @ right
        _wait(device)
        stop = time.perf_counter() if device == "cuda" else time.process_time()
        best = max(best, 3 * 2 * size**3 / (stop - start))
    return best


def parser(description: str) -> argparse.ArgumentParser:
    """Read what all of them take."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few images and tokens, one round")
    made.add_argument("--json", type=Path, help="write the lines as a list")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    made.add_argument("--threads", nargs="+", type=int, help="default: 1 and all")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batch-size", type=int, help="images; default 4, 2 with --quick")
    made.add_argument("--preset", default="base", help="anything but base has no targets")
    made.add_argument("--image-size", type=int, default=384, help="pixels")
    return made


def measured_config(options: argparse.Namespace) -> MEDConfig:
    """Return the preset at the image size asked for, with BERT's vocabulary."""
    config = MEDConfig.preset(options.preset, vocab_size=30524)
    return replace(config, vision=replace(config.vision, image_size_px=options.image_size))


def is_judged(options: argparse.Namespace) -> bool:
    """Whether targets are meant for what is measured: the whole base preset at 384 px."""
    return options.preset == "base" and options.image_size == 384 and not options.quick


def prepare(made: argparse.ArgumentParser) -> tuple[argparse.Namespace, int, list[int]]:
    """Read the command line and say what the machine is; returns options, rounds and numbers of threads."""
    options = made.parse_args()
    options.batch_size = options.batch_size or (2 if options.quick else 4)
    everything = torch.get_num_threads()
    counts = [everything] if options.device == "cuda" else sorted({1, everything})
    torch.manual_seed(0)
    print_machine(options.device)
    return options, 1 if options.quick else options.rounds, options.threads or counts
