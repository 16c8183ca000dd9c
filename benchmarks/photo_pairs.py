"""Captioned photographs for a training: vision tokens made once, and batches as a function of their number.

Dimension key: I images, P image tokens, D width, B batch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip_core import MED, Batch, EvalTransform, MEDTokenizer, clean_caption, decode_image
from blip_core.transforms import IMAGENET_MEAN, IMAGENET_STD

ENCODE_BATCH = 32
WINDOW = 8
"""Batches among which texts are sorted by length."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images of one split in the order of the file, with their captions and vision tokens."""

    names: list[str]
    captions: list[list[str]]
    tokens: np.ndarray
    """(I, P, D) float16, mapped from a file."""

    def token_batches(self) -> Iterator[Tensor]:
        """Yield the tokens (B, P, D) in order, float32."""
        for start in range(0, len(self.tokens), ENCODE_BATCH):
            yield torch.from_numpy(self.tokens[start : start + ENCODE_BATCH].astype(np.float32))


def read_records(photos: Path, split: str, limit: int | None) -> list[dict]:
    """Return the first `limit` records ({image, captions}) of a split; all of them with None."""
    records = json.loads((photos / "captions.json").read_text(encoding="utf-8"))
    return [record for record in records if record["split"] == split][:limit]


def pixel_batches(photos: Path, names: Sequence[str], size_px: int) -> Iterator[Tensor]:
    """Yield normalised pixels (B, 3, S, S) of images in order."""
    transform = EvalTransform(size_px, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for start in range(0, len(names), ENCODE_BATCH):
        paths = [photos / "images" / name for name in names[start : start + ENCODE_BATCH]]
        yield torch.stack([transform(decode_image(path.read_bytes())) for path in paths])


@torch.inference_mode()
def encoded_split(
    model: MED, photos: Path, records: list[dict], path: Path, dtype: str = "bfloat16"
) -> Split:
    """Return a split with its vision tokens, made into the file `path` or found there whole."""
    names = [record["image"] for record in records]
    vision = model.config.vision
    shape = (len(names), vision.num_tokens, vision.width)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"_tmp-{path.name}")  # a killed run leaves no half file
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        start = 0
        for pixel_values in pixel_batches(photos, names, vision.image_size_px):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                tokens = model.eval().encode_image(pixel_values)
            out[start : start + len(tokens)] = tokens.float().numpy()
            start += len(tokens)
        out.flush()
        partial.replace(path)
    tokens = np.load(path, mmap_mode="r")
    if tokens.shape != shape:
        raise SystemExit(f"{path} holds {tokens.shape}, wanted {shape}: use another --out")
    return Split(names, [record["captions"] for record in records], tokens)


class PairFeed:
    """Batch number n of pairs: an epoch holds every image once, and takes its captions in turn.

    Within a few batches texts are sorted by length, so that little is padded, and no negative of a batch
    can be told by its length alone.
    """

    def __init__(
        self, split: Split, tokenizer: MEDTokenizer, *, batch_size: int, max_tokens: int, seed: int
    ) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.per_epoch = len(split.names) // batch_size
        if self.per_epoch == 0:
            raise SystemExit(f"{len(split.names)} images do not fill a batch of {batch_size}")
        self._lengths = [
            tokenizer.encode([clean_caption(text) for text in texts], max_tokens)
            .attention_mask.sum(dim=1)
            .tolist()
            for texts in split.captions
        ]
        self._first = np.random.default_rng([seed]).integers(0, 1 << 30, len(split.names))
        self._epoch, self._batches = -1, np.zeros((0, batch_size), dtype=np.int64)

    def caption_of(self, image: int, epoch: int) -> int:
        """Return the number of the caption that an image has in an epoch."""
        return int(self._first[image] + epoch) % len(self.split.captions[image])

    def __call__(self, number: int) -> Batch:
        """Return batch `number`."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        images = self._batches[place]
        texts = [self.split.captions[i][self.caption_of(i, epoch)] for i in images]
        tokens = torch.from_numpy(self.split.tokens[images].astype(np.float32))
        return Batch(texts, [self.split.names[i] for i in images], image_embeds=tokens)

    def _order(self, epoch: int) -> np.ndarray:
        """Images (per_epoch, B) of an epoch's batches."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.split.names))[: self.per_epoch * self.batch_size]
        length = {i: self._lengths[i][self.caption_of(i, epoch)] for i in order.tolist()}
        size = WINDOW * self.batch_size
        windows = [order[start : start + size] for start in range(0, len(order), size)]
        in_order = [sorted(window.tolist(), key=length.__getitem__) for window in windows]
        return rng.permutation(np.concatenate(in_order).reshape(-1, self.batch_size))
