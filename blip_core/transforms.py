"""Image bytes to tensors: safe decoding, training and evaluation transforms (BLIP, section 4.1).

Pillow and numpy only: torch is imported by what makes tensors, so that processes which only decode start without it.
Dimension key: B batch, S image side.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from blip_core.augment import rand_augment
from blip_core.config import require
from blip_core.errors import DecodeError

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 89_000_000
"""Just below the size at which Pillow itself begins to warn."""

Augment = Literal["none", "flip_crop", "paper"]
Triple = tuple[float, float, float]

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode bytes to an RGB picture, upright by its EXIF orientation.

    Raises DecodeError with reason `not_an_image`, `too_many_pixels` (found before any pixel is decoded) or
    `truncated`. Transparent parts become white.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise DecodeError("too_many_pixels", str(err)) from err
    except (OSError, ValueError, SyntaxError) as err:
        raise DecodeError("not_an_image", str(err)) from err
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            "too_many_pixels", f"{width} x {height}, at most {max_pixels} are decoded"
        )
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, IndexError, EOFError) as err:
        raise DecodeError("truncated", str(err)) from err


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


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
    """Resize to (S, S) bicubically, aspect ratio given up as in the reference, and normalise."""

    def __init__(self, size: int, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD) -> None:
        require(size > 0, f"size must be above 0, got {size}")
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, S, S) float32."""
        import torch

        return self.normalise(torch.from_numpy(self.pixels(image))[None])[0]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> (S, S, 3) uint8: what a decoding process hands on, a quarter of the tensor's bytes."""
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.array(image)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8, as `pixels` gave them -> (B, 3, S, S) float32, on the same device."""
        return normalise(pixels, self.mean, self.std)


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
    import torch

    return normalise(torch.from_numpy(np.array(image))[None], mean, std)[0]


def normalise(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(B, S, S, 3) uint8 -> normalised (B, 3, S, S) float32."""
    import torch

    floats = pixels.permute(0, 3, 1, 2).float() / 255.0
    centre = torch.tensor(mean, device=pixels.device)[:, None, None]
    spread = torch.tensor(std, device=pixels.device)[:, None, None]
    return ((floats - centre) / spread).contiguous()
