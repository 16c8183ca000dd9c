"""Image bytes to tensors: safe decoding, training and evaluation transforms (BLIP, section 4.1).

Pillow and numpy only: torch is imported by what makes tensors, so that processes which only decode start without it.
Dimension key: B batch, S image side.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

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
MAX_ASPECT = 100
"""Longer side over shorter side: beyond it a square of the picture shows nothing of it, and a resize that
keeps the ratio would make gigabytes of it."""

Augment = Literal["none", "flip_crop", "paper"]
Triple = tuple[float, float, float]

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, *, target_px: int | None = None
) -> Image.Image:
    """Decode bytes to an RGB picture, upright by its EXIF orientation; of an animation the first frame.

    With `target_px` a JPEG whose sides are both at least twice that is decoded to a half, a quarter or an eighth
    of its size, with no side below `target_px`: several times faster, slightly other pixels. Transparent
    parts become white; 16 bits a channel become 8.

    Raises DecodeError with reason `not_an_image`, `too_many_pixels` (found before any pixel is decoded) or
    `truncated`.
    """
    image = _opened(data, max_pixels)
    return _loaded(image, reduction(image, target_px))


def decode_for(data: bytes, transforms: Sequence[Any]) -> list[Image.Image]:
    """Image bytes -> the picture that each transform is to be given; once for all that take the same reduction.

    A transform that names a `decode_px` gets a JPEG reduced to that, whatever other transforms stand beside it.
    Raises DecodeError as `decode_image`, and, where a transform names one, `too_thin` for a picture whose sides
    differ by a factor above MAX_ASPECT.
    """
    image = _opened(data, MAX_PIXELS)
    targets = [getattr(transform, "decode_px", None) for transform in transforms]
    width, height = image.size
    if any(targets) and max(image.size) > MAX_ASPECT * min(image.size):
        raise DecodeError(
            "too_thin", f"{width} x {height}, one side more than {MAX_ASPECT} times the other"
        )
    factors = [reduction(image, target) for target in targets]
    pictures: dict[int, Image.Image] = {}
    for factor in set(factors):
        pictures[factor] = _loaded(image if not pictures else _opened(data, MAX_PIXELS), factor)
    return [pictures[factor] for factor in factors]


def picture_tensor(data: bytes, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Image bytes -> what one transform makes of the picture. Raises DecodeError as `decode_for`."""
    (picture,) = decode_for(data, [transform])
    return transform(picture)


def reduction(image: Image.Image, target_px: int | None) -> int:
    """By how much a JPEG is reduced while it is decoded: 8, 4, 2 or, as any other picture, 1.

    The largest that leaves no side below `target_px`; 1 without a target.
    """
    if target_px is None or image.format not in ("JPEG", "MPO"):
        return 1
    fits = min(image.size) // target_px
    return max(factor for factor in (8, 4, 2, 1) if factor <= max(fits, 1))


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """A picture whose header alone is read. Raises DecodeError."""
    try:
        with warnings.catch_warnings():
            # The limit below decides; Pillow's own warning would only repeat it, once a process.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as err:
        raise DecodeError("too_many_pixels", str(err)) from err
    except (OSError, ValueError, SyntaxError) as err:
        raise DecodeError("not_an_image", _without_address(str(err))) from err
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            "too_many_pixels", f"{width} x {height}, at most {max_pixels} are decoded"
        )
    return image


def _loaded(image: Image.Image, factor: int) -> Image.Image:
    """An opened picture, decoded at 1 / `factor` of its size, upright and in RGB. Raises DecodeError."""
    try:
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, IndexError, EOFError) as err:
        raise DecodeError("truncated", _without_address(str(err))) from err


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
    """Resize to (S, S) bicubically, aspect ratio given up as in the reference, and normalise."""

    def __init__(
        self, size: int, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD, *, quick: bool = False
    ) -> None:
        """`quick` resizes by torch, four times faster than Pillow and within 2 of 255 of it, and sets `decode_px`.

        `decode_px` tells `decode_for` how small a JPEG may be decoded; None is whole.
        """
        require(size > 0, f"size must be above 0, got {size}")
        self.size, self.mean, self.std, self.quick = size, mean, std, quick
        self.decode_px = size if quick else None

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, S, S) float32."""
        import torch

        return self.normalise(torch.from_numpy(self.pixels(image))[None])[0]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> (S, S, 3) uint8: what a decoding process hands on, a quarter of the tensor's bytes."""
        side = (self.size, self.size)
        if image.size == side:
            return np.array(image)
        if not self.quick:
            return np.array(image.resize(side, Image.Resampling.BICUBIC))
        return _resized(image, side)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8, as `pixels` gave them -> (B, 3, S, S) float32, on the same device."""
        return normalise(pixels, self.mean, self.std)


class TrainTransform:
    """Crop, mirror and distort a picture, and keep its caption true.

    "none" is the evaluation transform; "flip_crop" is a random crop and a mirror; "paper" adds RandAugment
    (N = 2, M = 5). When a picture is mirrored, `left` and `right` change places in the caption, unless
    `swap_sides` is False, as the reference leaves them. A crop has `min_crop_area` of the picture or more: 0.2
    in the paper's pretraining, 0.5 in its finetuning.
    """

    def __init__(
        self,
        size: int,
        augment: Augment = "paper",
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
        min_crop_area: float = 0.2,
        swap_sides: bool = True,
    ) -> None:
        known = ("none", "flip_crop", "paper")
        require(augment in known, f"augment must be one of {', '.join(known)}, got {augment!r}")
        require(0 < min_crop_area <= 1, f"min_crop_area must be in (0, 1], got {min_crop_area}")
        self.size, self.augment, self.min_crop_area = size, augment, min_crop_area
        self.swap_sides = swap_sides
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
            image = ImageOps.mirror(image)
            caption = swap_sides(caption) if self.swap_sides else caption
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

    # made contiguous while they are bytes: the arithmetic then runs over whole planes, seven times faster
    floats = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255.0)
    centre = torch.tensor(mean, device=pixels.device)[:, None, None]
    spread = torch.tensor(std, device=pixels.device)[:, None, None]
    return floats.sub_(centre).div_(spread)


def _resized(image: Image.Image, side: tuple[int, int]) -> np.ndarray:
    """RGB picture -> (S, S, 3) uint8, by torch's bicubic kernel for bytes."""
    import torch
    import torch.nn.functional as F

    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, side, mode="bicubic", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
