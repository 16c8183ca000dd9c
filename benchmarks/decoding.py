"""Images a core decodes and resizes for a model in a second: by ours and by transformers.

    python benchmarks/decoding.py [--quick] [--json PATH] [--images FOLDER] [--side 384]

JPEGs of three sizes (drawn here, or the pictures of a folder scaled to them) become the model's tensor, on one thread:

    ours       `picture_tensor`: a JPEG of twice the side or more is decoded to a half, quarter or eighth; torch resizes
    whole      the same without reduced decoding
    pillow     the same as `whole`, but Pillow resizes: what training reads
    theirs     PIL, convert("RGB"), then BlipImageProcessor of transformers

CPU time, the ways taken in turns, medians over rounds. `change` is how far our tensor is from that of `pillow`: mean absolute difference in units of 1/255 a channel.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blip_core import EvalTransform, decode_image, picture_tensor
from blip_core.transforms import CLIP_STD

SIZES = ((640, 480), (1600, 1200), (4000, 3000))
QUALITY = 90
Decode = Callable[[bytes], torch.Tensor]


def drawn(size: tuple[int, int], seed: int) -> Image.Image:
    """Return noise of many scales, which takes about as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for cell in (256, 64, 16, 4):
        shape = (size[1] // cell + 2, size[0] // cell + 2, 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) * cell**0.5
    return Image.fromarray((picture / (16 + 8 + 4 + 2)).clip(0, 255).astype(np.uint8))


def jpegs(size: tuple[int, int], number: int, folder: Path | None) -> list[bytes]:
    """Encode `number` pictures of one size: drawn, or the first of a folder, scaled."""
    files = sorted(folder.glob("*.jpg"))[:number] if folder else []
    pictures = [Image.open(path).convert("RGB").resize(size) for path in files]
    found = []
    for picture in pictures or [drawn(size, seed) for seed in range(number)]:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        found.append(file.getvalue())
    return found


def ways(side: int) -> dict[str, Decode]:
    """Return the ways from bytes to a tensor of (3, side, side)."""
    from transformers import BlipImageProcessor

    transform, pillow = EvalTransform(side, quick=True), EvalTransform(side)
    processor = BlipImageProcessor(size={"height": side, "width": side})

    def theirs(data: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    return {
        "ours": lambda data: picture_tensor(data, transform),
        "whole": lambda data: transform(decode_image(data)),
        "pillow": lambda data: pillow(decode_image(data)),
        "theirs": theirs,
    }


def rates(files: list[bytes], side: int, rounds: int) -> dict[str, float]:
    """Return images a CPU second by way, medians over rounds in which the ways take turns."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, decode in ways(side).items():
            started = time.process_time()
            for data in files:
                decode(data)
            taken.setdefault(name, []).append((time.process_time() - started) / len(files))
    return {name: 1.0 / statistics.median(seconds[1:]) for name, seconds in taken.items()}


def change(files: list[bytes], side: int) -> float:
    """Return the mean difference between our tensors and those of training, in units of 1/255."""
    transform, pillow = EvalTransform(side, quick=True), EvalTransform(side)
    std = torch.tensor(CLIP_STD)[:, None, None] * 255
    differences = [
        ((picture_tensor(data, transform) - pillow(decode_image(data))) * std).abs().mean()
        for data in files
    ]
    return float(torch.stack(differences).mean())


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--json", type=Path, help="write the lines as a list")
    parser.add_argument("--images", type=Path, help="folder of JPEGs instead of drawn pictures")
    parser.add_argument("--side", type=int, default=384, help="side of the model's input, px")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for size in SIZES:
        number = 4 if options.quick or size[0] > 3000 else 12
        files = jpegs(size, number, options.images)
        found = rates(files, options.side, 3 if options.quick else 7)
        weight = sum(map(len, files)) / len(files) / 1000
        print(
            f"{size[0]} x {size[1]}, {weight:,.0f} kB: "
            + ", ".join(f"{name} {rate:.1f}/s" for name, rate in found.items())
            + f", change {change(files, options.side):.2f}",
            flush=True,
        )
        for name in ("whole", "pillow", "theirs"):
            line = {"name": f"decode {size[0]} x {size[1]} against {name}, images a core-second"}
            numbers = {"ours": found["ours"], "theirs": found[name]}
            lines.append(line | numbers | {"ratio": found["ours"] / found[name], "target": None})
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
