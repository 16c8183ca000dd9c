"""How many changed copies of pictures are known again, how many others are taken for one, and how fast the search is.

    python benchmarks/alike.py --images FOLDER [FOLDER ...] [--most 600] [--known 10000000] [--json PATH]

Each picture of the folders (JPEG, PNG) is changed in each of twelve ways and looked for among all of them: `recall` is
the share whose original is found, `wrong` the number for which another is. Then every picture is looked for among those
before it: each hit is a true copy in the folder or a false one, and is named to be looked at. With `--known`, so many
made-up hashes are put into the index, five a picture, and half a tail more, and pictures are looked up: seconds, memory of
the process (looked at each 5 ms: what is its own, what is mapped from files, and the most of both together), disk. Without `--images` only the speed is measured.
"""

import argparse
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from storage.intake.alike import KnownLooks
from storage.intake.looks import EDGE_BITS, VIEWS, looks_of
from storage.intake.near import TAIL, NearIndex

BATCH = 10_000
LOOKED_UP = 2000


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compressed again."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without so much of each side."""
    width, height = image.size
    left, top = int(width * share), int(height * share)
    return image.crop((left, top, width - left, height - top))


def with_bar(image: Image.Image, colour: str) -> Image.Image:
    """With a line of text on a bar below."""
    width, height = image.size
    framed = Image.new("RGB", (width, height + height * 15 // 100), colour)
    framed.paste(image, (0, 0))
    ink = "white" if colour == "black" else "black"
    ImageDraw.Draw(framed).text((10, height + 6), "a caption on a bar", fill=ink)
    return framed


def brighter(image: Image.Image) -> Image.Image:
    """15 % more contrast and a little more light."""
    return Image.fromarray(np.clip(np.asarray(image) * 1.15 + 8, 0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a quarter of it": lambda image: image.resize((image.width // 4, image.height // 4)),
    "JPEG quality 40": lambda image: jpeg(image, 40),
    "JPEG quality 15": lambda image: jpeg(image, 15),
    "2 % cropped off each side": lambda image: cropped(image, 0.02),
    "5 % cropped off each side": lambda image: cropped(image, 0.05),
    "white border": lambda image: ImageOps.expand(image, 12, "white"),
    "black border": lambda image: ImageOps.expand(image, 12, "black"),
    "caption on a black bar": lambda image: with_bar(image, "black"),
    "caption on a white bar": lambda image: with_bar(image, "white"),
    "brighter": brighter,
    "grey": lambda image: image.convert("L"),
}


def paths_of(folder: Path, most: int) -> list[Path]:
    """Pictures below a folder, evenly drawn from all of them."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return paths[:: max(1, len(paths) // most)][:most]


def recalls(paths: list[Path], scratch: Path) -> Iterator[dict[str, Any]]:
    """A line for each change."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    with KnownLooks(scratch) as known:
        for number, picture in enumerate(pictures):
            known.add(f"{number:032x}", looks_of(picture))
        for name, change in CHANGES.items():
            found = [known.find(looks_of(change(picture))) for picture in pictures]
            right = sum(each == f"{number:032x}" for number, each in enumerate(found))
            wrong = sum(each not in (None, f"{n:032x}") for n, each in enumerate(found))
            yield {
                "name": name,
                "pictures": len(pictures),
                "recall": round(right / len(pictures), 4),
                "wrong": wrong,
            }


def alike(folder: Path, scratch: Path) -> dict[str, Any]:
    """Each picture of a folder looked for among those before it."""
    paths = paths_of(folder, 10**9)
    hits = []
    took = 0.0
    with KnownLooks(scratch) as known:
        for number, path in enumerate(paths):
            with Image.open(path) as image:
                image.load()
                began = time.perf_counter()
                looks = looks_of(image)
                took += time.perf_counter() - began
            found = known.find(looks)
            if found is not None:
                hits.append([path.name, paths[int(found, 16)].name])
            known.add(f"{number:032x}", looks)
    return {
        "name": f"pairs of {folder.name} taken for copies",
        "pictures": len(paths),
        "pairs": len(paths) * (len(paths) - 1) // 2,
        "hits": len(hits),
        "such as": hits[:20],
        "ms to compute looks": round(1000 * took / max(1, len(paths)), 3),
    }


def memory_mib() -> dict[str, float]:
    """What the kernel says of this process: VmHWM, RssAnon, RssFile and others, in MiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[-1:] == ["kB"]}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most of each figure of `memory_mib` while the block runs; VmHWM is the kernel's own, since the process began."""
    most = memory_mib()
    ended = threading.Event()

    def look() -> None:
        for name, value in memory_mib().items():
            most[name] = max(most[name], value)

    def watch() -> None:
        while not ended.wait(0.005):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        look()


def speed(known: int, scratch: Path) -> dict[str, Any]:
    """So many hashes in the index, then pictures looked up in it: random hashes share bands as seldom as can be."""
    drawn = np.random.default_rng(0)
    more = TAIL // 2
    with watched() as most, NearIndex(scratch, EDGE_BITS) as index:
        free = os.statvfs(scratch).f_bavail
        before = most.copy()
        began = time.perf_counter()
        for first in range(0, known + more, BATCH):
            number = min(BATCH, known + more - first)
            hashes = drawn.integers(0, 2**64, number, dtype=np.uint64)
            index.add(hashes, np.arange(first, first + number, dtype=np.uint64))
        added = time.perf_counter() - began
        asked = drawn.integers(0, 2**64, (LOOKED_UP, VIEWS), dtype=np.uint64)
        began = time.perf_counter()
        for each in asked:
            index.within(each)
        looked_up = (time.perf_counter() - began) / LOOKED_UP
        used = (free - os.statvfs(scratch).f_bavail) * os.statvfs(scratch).f_frsize
    return {
        "name": f"index of {known:,} hashes",
        "seconds to build": round(added, 1),
        "ms to look a picture up": round(1000 * looked_up, 3),
        "MiB before": round(before["VmRSS"]),
        "most MiB of its own": round(most["RssAnon"]),
        "most MiB mapped from files": round(most["RssFile"]),
        "most MiB together": round(most["VmHWM"]),
        "MiB of disk": round(used / 2**20),
    }


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--most", type=int, default=600, help="pictures of a folder to change")
    parser.add_argument("--known", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="alike-") as name:
        scratch = Path(name)
        if options.known:
            lines.append(speed(options.known, scratch))
            print(json.dumps(lines[-1]), flush=True)
        for folder in options.images:
            for line in recalls(paths_of(folder, options.most), scratch):
                lines.append({"folder": folder.name, **line})
                print(json.dumps(lines[-1]), flush=True)
            lines.append(alike(folder, scratch))
            print(json.dumps(lines[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
