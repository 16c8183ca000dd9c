"""RandAugment as BLIP uses it, on Pillow (N = 2, M = 5; Cubuk et al. 2020).

Ten operations, none that changes colours, because captions name them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
MAGNITUDE = 5
_MAX_MAGNITUDE = 10
_APPLY_PROBABILITY = 0.5
_FILL = (128, 128, 128)

_ENHANCE = MAGNITUDE / _MAX_MAGNITUDE * 1.8 + 0.1
_SHEAR = MAGNITUDE / _MAX_MAGNITUDE * 0.3
_TRANSLATE = MAGNITUDE / _MAX_MAGNITUDE * 10 / 224  # ten pixels of the paper's 224
_DEGREES = MAGNITUDE / _MAX_MAGNITUDE * 30

Operation = Callable[[Image.Image, float], Image.Image]
"""Takes a picture and a sign, +1 or -1."""


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        resample=Image.Resampling.BILINEAR,
        fillcolor=_FILL,
    )


def _rotate(image: Image.Image, sign: float) -> Image.Image:
    return image.rotate(sign * _DEGREES, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, sign: image,
    "auto_contrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCE),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCE),
    "shear_x": lambda image, sign: _affine(image, (1, sign * _SHEAR, 0, 0, 1, 0)),
    "shear_y": lambda image, sign: _affine(image, (1, 0, 0, sign * _SHEAR, 1, 0)),
    "translate_x": lambda image, sign: _affine(
        image, (1, 0, sign * _TRANSLATE * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * _TRANSLATE * image.height)
    ),
    "rotate": _rotate,
}


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Draw two operations, repeats allowed, and apply each with probability 0.5."""
    names = list(OPERATIONS)
    for _ in range(NUM_OPERATIONS):
        operation = OPERATIONS[names[int(rng.integers(len(names)))]]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if rng.random() < _APPLY_PROBABILITY:
            image = operation(image, sign)
    return image
