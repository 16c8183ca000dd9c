"""Pictures with captions for a lake that needs no world."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from storage import CaptionSetConfig, Lake, ingest_captions

WORDS = ("red", "blue", "green", "white"), ("ring", "square", "cross", "disc")


def ingest_noise(folder: Path, lake: Lake, first: int, end: int) -> None:
    """Pictures of noise with two captions each, which can only be learned by heart."""
    images = folder / f"images-{first}"
    images.mkdir()
    rows = []
    for index in range(first, end):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        for _ in range(2):
            colour, shape = (words[rng.integers(4)] for words in WORDS)
            rows.append({"image": f"{index}.png", "caption": f"a {colour} {shape} {index % 7}"})
    captions = folder / f"captions-{first}.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CaptionSetConfig(
        captions=str(captions), images=str(images), pool="human", name=f"set-{first}"
    )
    ingest_captions(lake, config)
