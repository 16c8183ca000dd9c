"""A held-out set, encoded once for every evaluation; and matching of any of its images with any texts.

Dimension key: I images, T texts, B batch, P image tokens, L text tokens, D width, E shared width, N pairs.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip_core.config import require
from blip_core.errors import ConfigError
from blip_core.med import MED
from blip_core.tokenizer import MEDTokenizer, clean_caption, require_vocabulary

MAX_HELD_BYTES = 1 << 30
_PAIR_BATCH = 256
_IMAGE_BATCH = 8
"""Images whose keys and values are in memory at once (base, 384 px, float32: 43 MB each)."""


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """A held-out set, encoded once for every evaluation; on the CPU."""

    image_embeds: Tensor
    """(I, P, D); mapped from a nameless file when it is large."""
    image_features: Tensor
    """(I, E), L2-normalised."""
    text_features: Tensor
    """(T, E), L2-normalised."""
    texts: list[str]
    """T cleaned texts."""
    text_image_index: Tensor
    """(T,) int64: the image that a text describes."""
    max_text_tokens: int = 35
    """Longest text in tokens, special tokens included."""


@torch.inference_mode()
def encode_pairs(
    model: MED,
    tokenizer: MEDTokenizer,
    images: Iterable[Tensor],
    captions: Sequence[Sequence[str]],
    *,
    device: torch.device | str = "cpu",
    max_text_tokens: int = 35,
    max_held_bytes: int = MAX_HELD_BYTES,
    spill_folder: str | Path | None = None,
) -> EncodedPairs:
    """Encode batches of pixel values (B, 3, S, S) and the captions of every image, in the same order.

    A batch may also be image tokens (B, P, D) that a frozen vision encoder gave before.
    Image embeddings of more than `max_held_bytes` go to a file without a name in `spill_folder` (default:
    the folder for temporary files), which is gone with the process. Raises ConfigError when images and
    captions differ in number, when that folder has no room and when a feature is not finite.
    """
    model.require_head("itc", "an evaluation of retrieval")
    require_vocabulary(model.config.text, tokenizer)
    limit = model.config.text.max_positions
    require(
        max_text_tokens <= limit,
        f"max_text_tokens {max_text_tokens} is above text.max_positions {limit}",
    )
    model = model.to(device).eval()
    texts = [clean_caption(text) for of_image in captions for text in of_image]
    batches = (pixel_values.to(device) for pixel_values in images)
    image_embeds, image_features = _encode_images(
        model, batches, len(captions), max_held_bytes, spill_folder
    )
    require(bool(texts), "there are no captions to evaluate on")
    features = []
    for start in range(0, len(texts), _PAIR_BATCH):
        tokens = tokenizer.encode(texts[start : start + _PAIR_BATCH], max_text_tokens).to(device)
        features.append(model.text_features(tokens.input_ids, tokens.attention_mask).float().cpu())
    index = [image for image, of_image in enumerate(captions) for _ in of_image]
    text_features = torch.cat(features)
    _require_finite("features", image_features, text_features)
    return EncodedPairs(
        image_embeds=image_embeds,
        image_features=image_features,
        text_features=text_features,
        texts=texts,
        text_image_index=torch.tensor(index),
        max_text_tokens=max_text_tokens,
    )


@torch.inference_mode()
def match_logits(
    model: MED,
    tokenizer: MEDTokenizer,
    pairs: EncodedPairs,
    image_rows: Sequence[int],
    texts: Sequence[str],
) -> Tensor:
    """Return ITM logits (N, 2) of images `image_rows` with `texts`, both of length N; on the CPU.

    A pair that occurs twice is computed once. Images are projected once, and their texts are read in order
    of length. Raises ConfigError when a logit is not finite.
    """
    if not texts:
        return torch.zeros(0, 2)
    model.require_head("itm", "an evaluation of matching")
    distinct: dict[str, int] = {}
    numbers = [distinct.setdefault(clean_caption(text), len(distinct)) for text in texts]
    keys, inverse = np.unique(
        np.asarray(image_rows) * len(distinct) + np.asarray(numbers), return_inverse=True
    )
    images, text_rows = np.divmod(keys, len(distinct))
    tokens = tokenizer.encode(list(distinct), pairs.max_text_tokens)
    input_ids, mask = tokenizer.encoder_ids(tokens.input_ids), tokens.attention_mask
    lengths = mask.sum(dim=1).numpy()
    logits = torch.zeros(len(keys), 2)
    for block in _blocks(images, lengths[text_rows]):
        rows = torch.from_numpy(images[block[:, 0]])
        image_kv = model.project_image(pairs.image_embeds[rows].to(model.device))
        step = max(1, _PAIR_BATCH // len(block))
        for start in range(0, block.shape[1], step):
            chosen = block[:, start : start + step].ravel()
            of_text = torch.from_numpy(text_rows[chosen])
            longest = int(lengths[text_rows[chosen]].max())
            logits[torch.from_numpy(chosen)] = (
                model.itm_logits_from_kv(
                    image_kv,
                    input_ids[of_text, :longest].to(model.device),
                    mask[of_text, :longest].to(model.device),
                )
                .float()
                .cpu()
            )
    _require_finite("match logits", logits)
    return logits[torch.from_numpy(inverse)]


def _encode_images(
    model: MED,
    batches: Iterable[Tensor],
    num_images: int,
    max_held_bytes: int,
    spill_folder: str | Path | None,
) -> tuple[Tensor, Tensor]:
    """Return image_embeds (I, P, D) and image features (I, E), filled batch by batch."""
    held: Tensor | None = None
    features, count = [], 0
    for pixel_values in batches:
        start, count = count, count + len(pixel_values)
        if count > num_images:  # only counted, for the message
            continue
        is_encoded = pixel_values.ndim == 3
        embeds = pixel_values if is_encoded else model.encode_image(pixel_values)
        if held is None:
            held = _room_for((num_images, *embeds.shape[1:]), max_held_bytes, spill_folder)
        held[start:count] = embeds.float().cpu()
        features.append(model.image_features(embeds).float().cpu())
    require(count > 0, "there are no images to evaluate on")
    require(count == num_images, f"{count} images, but captions of {num_images} images")
    assert held is not None, "a batch came, so there is room for it"
    return held, torch.cat(features)


def _room_for(
    shape: tuple[int, ...], max_held_bytes: int, spill_folder: str | Path | None
) -> Tensor:
    """Return an uninitialised float32 tensor, in memory or mapped from a file that has no name."""
    num_bytes = 4 * math.prod(shape)
    if num_bytes <= max_held_bytes:
        return torch.empty(shape)
    folder = tempfile.gettempdir() if spill_folder is None else str(spill_folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process later
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as err:
        raise ConfigError(
            f"{folder} cannot take {num_bytes:,} bytes of image embeddings ({err.strerror}): "
            "free some space, name another spill_folder, or evaluate on fewer images"
        ) from err


def _blocks(images: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks (B, K) of pair numbers: a row's pairs are of one image, from short to long texts.

    Every pair is in one block; an image with fewer pairs than the block is wide repeats some.
    """
    order = np.lexsort((lengths, images))
    _, starts, counts = np.unique(images[order], return_index=True, return_counts=True)
    by_count = np.argsort(-counts, kind="stable")
    while len(by_count):
        width = counts[by_count[0]]
        alike = by_count[:_IMAGE_BATCH]
        alike = alike[4 * counts[alike] >= 3 * width]  # little is repeated
        columns = np.arange(width) * counts[alike][:, None] // width
        yield order[starts[alike][:, None] + columns]
        by_count = by_count[len(alike) :]


def _require_finite(what: str, *tensors: Tensor) -> None:
    """NaN is above and below nothing, and would rank first everywhere."""
    require(
        all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
        f"the model gives {what} that are not finite: its weights are broken, use another checkpoint",
    )
