"""Image bytes to tensors: safe decoding, training and evaluation transforms (BLIP, section 4.1).

Pillow and numpy only. Dimension key: S image side.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from blip_core.augment import rand_augment
from blip_core.config import require
from blip_core.errors import DecodeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 89_000_000
"""Just below the size at which Pillow itself begins to warn."""
MAX_ASPECT = 100.0
"""Longer side over shorter side: beyond it a square of the picture shows nothing of it, and a resize that
keeps the ratio would make gigabytes of it."""

Augment = Literal["none", "flip_crop", "paper"]
Triple = tuple[float, float, float]

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    *,
    target_px: int | None = None,
    max_aspect: float | None = None,
) -> Image.Image:
    """Decode bytes to an RGB picture, upright by its EXIF orientation; of an animation the first frame.

    With `target_px` a JPEG whose sides are both at least twice that is decoded to a half, a quarter or an eighth
    of its size, with no side below `target_px`: several times faster, slightly other pixels. Transparent
    parts become white; 16 bits a channel become 8.

    Raises DecodeError with reason `not_an_image`, `too_many_pixels`, `too_thin` (its sides differ by a factor
    above `max_aspect`; both are found before any pixel is decoded) or `truncated`.
    """
    try:
        with warnings.catch_warnings():
            # The limit below decides; Pillow's own warning would only repeat it, once a process.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as err:
        raise DecodeError("too_many_pixels", str(err)) from err
    except (OSError, ValueError, SyntaxError) as err:
        raise DecodeError("not_an_image", _without_address(str(err))) from err
    _require_size(image, max_pixels, max_aspect)
    try:
        if target_px is not None:
            image.draft(None, (target_px, target_px))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, IndexError, EOFError) as err:
        raise DecodeError("truncated", _without_address(str(err))) from err


def picture_tensor(data: bytes, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Image bytes -> what `transform` makes of the picture: how captioning and scoring see an image.

    The picture is decoded no larger than the transform needs (its `size`, px, where it has one) and not at all when
    it is thinner than MAX_ASPECT. Raises DecodeError as `decode_image`.
    """
    target_px = getattr(transform, "size", None)
    return transform(decode_image(data, target_px=target_px, max_aspect=MAX_ASPECT))


def _require_size(image: Image.Image, max_pixels: int, max_aspect: float | None) -> None:
    """Raise DecodeError for a picture that is not worth its pixels; reads the header alone."""
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            "too_many_pixels", f"{width} x {height}, at most {max_pixels} are decoded"
        )
    if max_aspect is not None and max(image.size) > max_aspect * min(image.size):
        raise DecodeError(
            "too_thin", f"{width} x {height}, one side more than {max_aspect:g} times the other"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or more bits to 8: Pillow's own conversion cuts at 255, and all but black becomes white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    brightest = max(float(values.max()), 1.0)
    if 1.0 < brightest <= 255.0:  # no fixed range: what fits 8 bits is taken to be meant so
        brightest = 255.0
    scaled = (values.clip(0.0, brightest) * (255.0 / brightest)).round()
    return Image.fromarray(scaled.astype(np.uint8))


def _without_address(message: str) -> str:
    """An error of Pillow's less the buffer's address, so that the same bytes give the same words."""
    return re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", " these bytes", message)


def swap_sides(caption: str) -> str:
    """Exchange the words left and right: what a mirrored picture's caption must say."""
    return _SIDES.sub(_other_side, caption)


def _other_side(match: re.Match[str]) -> str:
    word = match.group()
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


class EvalTransform:
    """Resize to (S, S) bicubically, aspect ratio given up as in the reference, and normalise.

    `resize` names what resizes: `pillow`, as in training, or `torch`: faster, and within 2 of 255 of it.
    """

    def __init__(
        self,
        size: int,
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
        resize: Literal["pillow", "torch"] = "pillow",
    ) -> None:
        require(size > 0, f"size must be above 0, got {size}")
        require(resize in ("pillow", "torch"), f"resize must be pillow or torch, got {resize!r}")
        self.size, self.mean, self.std, self.resize = size, mean, std, resize

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, S, S) float32."""
        side = (self.size, self.size)
        if image.size == side:
            return to_tensor(image, self.mean, self.std)
        if self.resize == "pillow":
            image = image.resize(side, Image.Resampling.BICUBIC)
            return to_tensor(image, self.mean, self.std)
        planes = _planes(image)[None]
        resized = F.interpolate(planes, side, mode="bicubic", align_corners=False, antialias=True)
        return _normalised(resized[0], self.mean, self.std)


class TrainTransform:
    """Crop, mirror and distort a picture, and keep its caption true.

    "none" is the evaluation transform; "flip_crop" is a random crop and a mirror; "paper" adds RandAugment
    (N = 2, M = 5). When a picture is mirrored, `left` and `right` change places in the caption, which the
    reference forgets.
    """

    def __init__(
        self,
        size: int,
        augment: Augment = "paper",
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
        min_crop_area: float = 0.2,
    ) -> None:
        known = ("none", "flip_crop", "paper")
        require(augment in known, f"augment must be one of {', '.join(known)}, got {augment!r}")
        require(0 < min_crop_area <= 1, f"min_crop_area must be in (0, 1], got {min_crop_area}")
        self.size, self.augment, self.min_crop_area = size, augment, min_crop_area
        self.evaluation = EvalTransform(size, mean, std)

    def __call__(
        self, image: Image.Image, caption: str, rng: np.random.Generator
    ) -> tuple[Tensor, str]:
        """RGB picture and caption -> (3, S, S) float32 and the caption; all draws come from `rng`."""
        if self.augment == "none":
            return self.evaluation(image), caption
        box = random_crop_box(image.size, self.min_crop_area, rng)
        side = (self.size, self.size)
        image = image.resize(side, Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image, caption = ImageOps.mirror(image), swap_sides(caption)
        if self.augment == "paper":
            image = rand_augment(image, rng)
        return self.evaluation(image), caption


def random_crop_box(
    size: tuple[int, int], min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box of `min_area` to all of the picture, with a ratio of sides from 3:4 to 4:3.

    After ten boxes that do not fit, the whole picture.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def to_tensor(image: Image.Image, mean: Triple, std: Triple) -> Tensor:
    """RGB picture -> normalised (3, S, S) float32."""
    return _normalised(_planes(image), mean, std)


def _planes(image: Image.Image) -> Tensor:
    """RGB picture -> (3, height, width) uint8, a view of (height, width, 3)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _normalised(planes: Tensor, mean: Triple, std: Triple) -> Tensor:
    # made contiguous while they are bytes: the arithmetic then runs over whole planes, seven times faster
    pixels = planes.contiguous().float().div_(255.0)
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
