"""One pretraining step against a plain one made of transformers' BLIP classes.

Both do the same: ITC with momentum twins and a full queue, ITM with hard negatives, LM with label
smoothing, dropout 0.1 in the text stack, gradient clipping and AdamW, on the same captions. Before
anything is timed, two small models with the same weights must give the same losses and gradients.

    python benchmarks/train_step.py [--quick] [--json PATH] [--profile] [--compile] [--device cuda]

With --compile the baseline is our own step, and `ours` the same with `TrainConfig.compile`. The ratio is of process CPU time on a CPU, of wall time on a GPU: medians of interleaved rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from equal_work import check_equal_size, check_equal_work
from our_step import WORDS, OurStep, make_batch
from plain_blip import MAX_TOKENS, PlainBLIP, PlainStep, Recipe
from step_profile import marked, print_table, profile_step
from torch import Tensor

from blip_core import Batch, MEDConfig, MEDTokenizer, build_model
from blip_core.flops import known_peak_flops, step_flops
from blip_core.objectives import OBJECTIVES

TARGETS = {("bfloat16", "padded"): 1.6, ("float32", "padded"): 1.7}
TARGET_LONGEST = 1.2
"""Of the whole base preset; a smaller model has none."""
QUICK_DEPTH, QUICK_BATCH = 2, 4
"""Layers of each stack, and images, with --quick; the preset's widths and vocabulary stay."""

Step = Callable[[Batch], Tensor]


def measure(
    steps: dict[str, Step], batches: list[Batch], device: str
) -> dict[str, dict[str, list[float]]]:
    """Run every step on every batch, interleaved; the first batch only warms up.

    Returns the seconds of each round, `cpu` (this process, all threads) and `wall`, for each step.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in steps}
    order = list(steps)
    for index, batch in enumerate(batches):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            if device == "cuda":
                torch.cuda.synchronize()
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name](batch)
            if device == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name]["cpu"].append(time.process_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def compare(
    dtype: str, seconds: dict[str, dict[str, list[float]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a line {name, ours, theirs, ratio, target} per baseline and clock."""
    lines, device = [], options.device
    has_target = options.preset == "base" and not options.quick and not options.compile
    for baseline in [name for name in seconds if name != "ours"]:
        target = TARGETS[dtype, "padded"] if baseline == "padded" else TARGET_LONGEST
        for clock in ("wall",) if device == "cuda" else ("cpu", "wall"):
            ours, theirs = (statistics.median(seconds[who][clock]) for who in ("ours", baseline))
            is_judged = has_target and (device == "cuda" or clock == "cpu")
            lines.append(
                {
                    "name": f"train_step/{dtype}/{baseline}/{clock}_s",
                    "ours": round(ours, 4),
                    "theirs": round(theirs, 4),
                    "ratio": round(theirs / ours, 3),
                    "target": target if is_judged else None,
                }
            )
    return lines


def print_rounds(dtype: str, seconds: dict[str, dict[str, list[float]]], device: str) -> None:
    """Print every round of the clock that is judged: how much the medians may be trusted."""
    clock = "wall" if device == "cuda" else "cpu"
    for name in seconds:
        rounds = " ".join(f"{each:.2f}" for each in seconds[name][clock])
        pairs = zip(seconds[name][clock], seconds["ours"][clock], strict=True)
        ratios = " ".join(f"{theirs / ours:.2f}" for theirs, ours in pairs)
        print(f"{dtype}, {name}, {clock} seconds of each round: {rounds}; over ours: {ratios}")


def print_flops(config: MEDConfig, batch: Batch, tokenizer: MEDTokenizer, step_s: float) -> None:
    """Print analytic FLOPs an image, and model FLOPs utilisation where the peak is known."""
    mask = tokenizer.encode(batch.captions, MAX_TOKENS).attention_mask
    num_images, longest = mask.shape
    predicted = round(float(mask.sum()) / num_images - 1)

    def count(tokens: int, lm_tokens: int, projections: int) -> float:
        return step_flops(
            config,
            num_text_tokens=tokens,
            objectives=OBJECTIVES,
            num_lm_tokens=lm_tokens,
            num_projections=projections,
        )

    ours = count(longest, predicted, 1)
    print(
        f"GFLOPs an image: ours {ours / 1e9:.1f}, plain at {longest} tokens "
        f"{count(longest, longest, 4) / 1e9:.1f}, "
        f"at {MAX_TOKENS} {count(MAX_TOKENS, MAX_TOKENS, 4) / 1e9:.1f}"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, rate = known_peak_flops(device), ours * num_images / step_s
    share = f"{100 * rate / peak:.1f} % of {peak / 1e12:.0f} T" if peak else "peak unknown"
    print(
        f"ours: {num_images / step_s:.2f} images/s, {rate / 1e12:.2f} TFLOP/s ({share}), by wall time"
    )


def print_profile(ours: OurStep, batch: Batch, dtype: str, device: str) -> None:
    """Print where one of our steps spends its time."""
    calls = (
        (ours.momentum, "update", "momentum update"),
        (ours.stepper.optimizer, "step", "optimizer"),
    )
    with marked((("", ours.model), ("twin", ours.momentum)), calls):
        tables = profile_step(lambda: ours(batch, dtype), cuda=device == "cuda")
    for title, table in tables.items():
        print_table(f"ours, {dtype}, {title}", table, 30)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one round, {QUICK_DEPTH} layers a stack, {QUICK_BATCH} images, no targets",
    )
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--profile", action="store_true", help="say where our step spends its time")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="our step with compiled vision blocks against without",
    )
    parser.add_argument("--preset", default="base")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32")
    )
    parser.add_argument(
        "--batch-size", type=int, help="default: 8 on a CPU, 128 on a GPU; 4 with --quick"
    )
    parser.add_argument("--longest", type=int, default=14, help="tokens of a batch's longest text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queue-size", type=int, default=Recipe().queue_size)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if not 4 <= options.longest <= MAX_TOKENS:
        parser.error(f"--longest must be 4 to {MAX_TOKENS}, got {options.longest}")
    return options


def measured_config(options: argparse.Namespace, vocab_size: int) -> MEDConfig:
    """Return the preset with room for `vocab_size` words at least, and few layers when it must be quick."""
    config = MEDConfig.preset(options.preset)
    vocab_size = max(vocab_size, config.text.vocab_size)
    config = replace(config, text=replace(config.text, vocab_size=vocab_size))
    if not options.quick:
        return config
    return replace(
        config,
        vision=replace(config.vision, depth=min(QUICK_DEPTH, config.vision.depth)),
        text=replace(config.text, depth=min(QUICK_DEPTH, config.text.depth)),
    )


def compared_steps(dtype: str, ours: OurStep, plain: PlainStep | None) -> dict[str, Step]:
    """Return our step and its baselines: transformers' classes, or without them our step uncompiled."""
    if plain is None:
        return {
            "ours": lambda batch: ours(batch, dtype, compiled=True),
            "uncompiled": lambda batch: ours(batch, dtype),
        }
    return {
        "ours": lambda batch: ours(batch, dtype),
        "padded": lambda batch: plain(batch, dtype, MAX_TOKENS),
        "longest": lambda batch: plain(batch, dtype, None),
    }


def main() -> None:
    """Check, measure, print."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, rounds = torch.device(options.device), 1 if options.quick else options.rounds
    batch_size = options.batch_size or (
        QUICK_BATCH if options.quick else 128 if options.device == "cuda" else 8
    )
    tokenizer = MEDTokenizer.train([" ".join(WORDS)] * 3, 400)
    print(f"same work: figures differ by {check_equal_work(tokenizer, device):.1e} at most")
    config, recipe = (
        measured_config(options, tokenizer.vocab_size),
        Recipe(queue_size=options.queue_size),
    )
    batches = [make_batch(config, batch_size, options.longest, seed) for seed in range(rounds + 1)]
    ours = OurStep(build_model(config, seed=0), tokenizer, recipe, device)
    if options.compile:
        ours.compile()
        num_parameters, plain = sum(each.numel() for each in ours.model.parameters()), None
    else:
        plain = PlainStep(PlainBLIP(config, recipe), tokenizer, recipe, device)
        num_parameters = check_equal_size(ours.model, plain.model)
    depths = f"{config.vision.depth} and {config.text.depth} layers"
    print(f"{options.preset}, {depths}, {num_parameters:,} parameters, {batch_size} images")
    lines: list[dict[str, Any]] = []
    for dtype in options.dtype:
        steps = compared_steps(dtype, ours, plain)
        seconds = measure(steps, batches, options.device)
        for line in compare(dtype, seconds, options):
            lines.append(line)
            print(json.dumps(line), flush=True)
        print_rounds(dtype, seconds, options.device)
        print_flops(config, batches[0], tokenizer, statistics.median(seconds["ours"]["wall"]))
        if options.profile:
            print_profile(ours, batches[0], dtype, options.device)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
